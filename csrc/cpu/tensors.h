// How tensors lie, and new tensors that lie as others do: geometry.py's rules. LibTorch stable ABI only.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>
#pragma GCC diagnostic pop

#include <optional>

#include "plain.h"

namespace vcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Calls f with a number of x's dtype.
template <class F> auto with_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(f16{});
    default: STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
}

// What aoti_torch_empty_strided wants.
inline int32_t dtype_code(const Tensor& x) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  return code;
}

template <class A> int32_t dtype_code() {
  return sizeof(A) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Its data, of which the caller knows the type; null where there is no tensor.
template <class T> T* data(const MaybeTensor& t) { return t ? static_cast<T*>(t->data_ptr()) : nullptr; }

struct Shape {
  int64_t dim = 0, sizes[8], strides[8];

  void add(int64_t size, int64_t stride) { sizes[dim] = size, strides[dim++] = stride; }

  // How many elements the dimensions from `first` on have.
  int64_t count(int64_t first) const {
    int64_t product = 1;
    for (int64_t i = first; i < dim; ++i) product *= sizes[i];
    return product;
  }

  // Whether the dimensions from `first` on, in some order, are one dimension of stride `step`.
  bool fill(int64_t first, int64_t step) const {
    int64_t filled = step;
    for (bool grown = true; grown;) {
      grown = false;
      for (int64_t i = first; i < dim; ++i) {
        if (sizes[i] > 1 && strides[i] == filled) filled *= sizes[i], grown = true;
      }
    }
    return filled == step * count(first);
  }

  bool lies_as(const Shape& other) const {
    for (int64_t i = 0; i < dim; ++i) {
      if (sizes[i] > 1 && strides[i] != other.strides[i]) return false;
    }
    return true;
  }
};

inline Shape shape_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() <= 8, "at most 8 dimensions are supported, got ", t.dim());
  Shape s;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) s.add(sizes[i], strides[i]);
  return s;
}

inline Strides strides_of(const Shape& s, bool per_activation) {
  if (per_activation) return {s.strides[0], 1, 1};
  int64_t pos = 0;
  for (int64_t i = 2; i < s.dim; ++i) {
    if (s.sizes[i] > 1 && (pos == 0 || s.strides[i] < pos)) pos = s.strides[i];
  }
  return {s.strides[0], s.strides[1], pos ? pos : 1};
}

inline Geometry geometry_of(const Shape& s, const SubBatches& sub_batches) {
  const auto [n, K, per_activation] = sub_batches;
  const int64_t N = s.sizes[0], C = s.sizes[1], inner = s.count(2);
  STD_TORCH_CHECK(n >= 1 && K >= 0 && K <= N / n, K, " sub-batches of ", n, " samples want more than the ", N,
                  " rows of x");
  const Strides strides = strides_of(s, per_activation);
  if (per_activation) return {N, K, n, C * inner, 1, false, strides};
  return {N, K, n, C, inner, inner > 1 && strides.pos == 1, strides};
}

// N samples one after another, each laid out as x's are (geometry.empty_rows).
inline Shape rows_as(Tensor x, Shape s, int64_t N) {
  if (!s.fill(1, 1)) s = shape_of(torch::stable::empty_like(torch::stable::narrow(x, 0, 0, 1)));
  s.sizes[0] = N, s.strides[0] = s.count(1);
  return s;
}

// One value for each unit, and with K > 0 for each sub-batch, in the memory order of x's units.
inline Shape units_as(const Shape& x, bool per_activation, int64_t K) {
  Shape s;
  if (K) s.add(K, per_activation ? x.count(1) : x.sizes[1]);
  if (!per_activation) s.add(x.sizes[1], 1);
  for (int64_t i = 1; per_activation && i < x.dim; ++i) s.add(x.sizes[i], x.strides[i]);
  return s;
}

// (empty_like goes through a look-up by name, dearer than a small loss.)
inline Tensor empty(const Shape& s, int32_t dtype) {
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(s.dim, s.sizes, s.strides, dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

inline Tensor empty_vector(int64_t size, int32_t dtype) { return empty({1, {size}, {1}}, dtype); }

template <class A> Tensor scalar(double value) {
  Tensor out = empty({}, dtype_code<A>());
  *data<A>(out) = A(value);
  return out;
}

// x, or a contiguous copy where its strides fit neither layout (geometry.in_layout): a compiler chooses them too.
inline Tensor in_layout(const Tensor& x, bool per_activation) {
  const Shape s = shape_of(x);
  STD_TORCH_CHECK(s.dim >= 2, "x must have 2 to 8 dimensions, got ", s.dim);
  if (per_activation) return s.fill(1, 1) ? x : torch::stable::contiguous(x);
  const int64_t C = s.sizes[1], P = s.count(2), step = strides_of(s, false).pos;
  const bool spatial = step == 1 && P > 1 && (C == 1 || s.strides[1] >= P);
  const bool unit = C == 1 || (s.strides[1] == 1 && (P == 1 || step >= C));
  return s.fill(2, step) && (spatial || unit) ? x : torch::stable::contiguous(x);
}

// t, or a copy of it that lies as `wanted`.
inline Tensor laid_out(const Tensor& t, const Shape& wanted) {
  if (shape_of(t).lies_as(wanted)) return t;
  Tensor copy = empty(wanted, dtype_code(t));
  torch::stable::copy_(copy, t);
  return copy;
}

// t, one value or one for each unit (and each sub-batch before it), in x's order of units (geometry.in_unit_order).
inline MaybeTensor in_unit_order(const MaybeTensor& t, const Shape& x, bool per_activation) {
  if (!t || t->dim() == 0) return t;
  const int64_t units = per_activation ? x.dim - 1 : 1;
  const Shape wanted = units_as(x, per_activation, t->dim() > units ? t->size(0) : 0);
  STD_TORCH_CHECK(t->numel() == wanted.count(0), "a tensor of one value for each unit must have ", wanted.count(0),
                  " of them, got ", t->numel());
  return laid_out(*t, wanted);
}

}  // namespace vcl

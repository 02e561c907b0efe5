// The CPU backend of the ops that vcl_kernels/ops.py defines: reads shapes, allocates results, cuts the work
// into tasks. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "job.h"

namespace vcl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- dtypes and instruction sets

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  return DType::f32;
}

int32_t accumulation(DType t) {
  return t == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

int64_t bytes(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// VCL_KERNELS_CPU=baseline|avx2|avx512 lowers the choice, for tests and for finding faults.
int best_instruction_set() {
  int best = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = 2;
  }
#endif
  const char* wish = std::getenv("VCL_KERNELS_CPU");
  if (wish && !std::strcmp(wish, "baseline")) best = 0;
  if (wish && !std::strcmp(wish, "avx2")) best = std::min(best, 1);
  return best;
}

Kernels kernels_for(DType t) {
  static const int best = best_instruction_set();
#if defined(__x86_64__)
  if (best == 2) return avx512::kernels(t);
  if (best == 1) return avx2::kernels(t);
#endif
  return baseline::kernels(t);
}

// ---- shapes

struct Shape {
  int64_t dim, sizes[8], strides[8];
  explicit Shape(const Tensor& t) : dim(t.dim()) {
    STD_TORCH_CHECK(dim >= 2 && dim <= 8, "x must have 2 to 8 dimensions, got ", dim);
    const auto s = t.sizes(), d = t.strides();
    for (int64_t i = 0; i < dim; ++i) sizes[i] = s[i], strides[i] = d[i];
  }

  // Whether the elements fill one block of memory, in some order of dimensions.
  bool dense() const {
    int64_t filled = 1;
    for (bool grown = true; grown;) {
      grown = false;
      for (int64_t i = 0; i < dim; ++i) {
        if (sizes[i] > 1 && strides[i] == filled) filled *= sizes[i], grown = true;
      }
    }
    int64_t count = 1;
    for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
    return filled == count;
  }
};

Strides strides_of(const Shape& s, bool per_activation) {
  int64_t pos = 0;
  for (int64_t i = 2; i < s.dim; ++i) {
    if (s.sizes[i] > 1 && (pos == 0 || s.strides[i] < pos)) pos = s.strides[i];
  }
  if (pos == 0) pos = 1;
  return per_activation ? Strides{s.strides[0], 1, 1} : Strides{s.strides[0], s.strides[1], pos};
}

View view_of(const Shape& s, int64_t n, int64_t K, bool per_activation) {
  int64_t inner = 1;
  for (int64_t i = 2; i < s.dim; ++i) inner *= s.sizes[i];
  if (per_activation) return {s.sizes[0], K, n, s.sizes[1] * inner, 1, false};
  const bool spatial = inner > 1 && strides_of(s, false).pos == 1;
  return {s.sizes[0], K, n, s.sizes[1], inner, spatial};
}

Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

Tensor empty_vector(int64_t size, int32_t dtype) {
  const int64_t one = 1;
  return empty(1, &size, &one, dtype);
}

Tensor scalar(int32_t dtype, DType t, double value) {
  Tensor out = empty(0, nullptr, nullptr, dtype);
  if (t == DType::f64) *(double*)out.data_ptr() = value;
  else *(float*)out.data_ptr() = float(value);
  return out;
}

// Like x, dense. (empty_like goes through a look-up by name, dearer than a small loss.)
Tensor empty_dense(const Tensor& x, const Shape& s) {
  if (!s.dense()) return torch::stable::empty_like(x);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty(s.dim, s.sizes, s.strides, dtype);
}

// One value for each unit, and with K > 0 for each sub-batch, in the memory order of x's units.
Tensor empty_units(const Shape& s, bool per_activation, int64_t K, int64_t U, int32_t dtype) {
  int64_t sizes[8], strides[8], dim = 0;
  if (K) sizes[dim] = K, strides[dim++] = U;
  if (!per_activation) {
    sizes[dim] = s.sizes[1], strides[dim++] = 1;
  } else {
    for (int64_t i = 1; i < s.dim; ++i) sizes[dim] = s.sizes[i], strides[dim++] = s.strides[i];
  }
  return empty(dim, sizes, strides, dtype);
}

// ---- tasks

constexpr int64_t kSerial = 32768;         // elements under which starting threads costs more than it gains
constexpr int64_t kBlockBytes = 512 << 10; // of x in a block of units: it is read again from L2
constexpr int64_t kStreamBytes = 16 << 20; // of dx from which stores bypass the caches

template <class F> void parallel(int64_t tasks, int64_t elements_per_task, const F& f) {
  if (tasks * elements_per_task < kSerial) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kSerial / 2 / std::max<int64_t>(1, elements_per_task)), f);
}

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Units in a block: as many as stay in L2; contiguous units at least 256 bytes wide.
int64_t block_units(const View& v, int64_t size) {
  const int64_t fit = kBlockBytes / std::max<int64_t>(1, v.K * v.n * v.P * size);
  if (v.spatial) return std::clamp<int64_t>(fit, 1, std::max<int64_t>(1, v.U / 16));
  return std::clamp<int64_t>(fit / 64 * 64, 64, 1024);
}

bool aligned_rows(const void* base, const View& v, const Strides& s, int64_t size) {
  const int64_t inner = (v.spatial ? s.unit | v.P : s.pos | v.U) * size;
  return (reinterpret_cast<uintptr_t>(base) | s.row * size | inner) % 64 == 0;
}

struct Request {
  const Tensor& x;
  const std::optional<Tensor>& beta;
  double beta_value, beta_min;
  int64_t n, K;
  Form form;
  bool per_activation;
  double factor;
  bool reduce, beta_grad;
};

struct Results {
  std::optional<Tensor> loss, dbeta, dx, mean, var, scale;
};

// Moments, and with a form the loss, coefficients (`want_scale`) or gradient (`want_dx`).
Results run(const Request& q, bool want_dx, bool want_moments, bool want_scale) {
  const DType t = dtype_of(q.x);
  const Shape shape(q.x);
  const int32_t acc = accumulation(t);
  Results out;
  Job j{};
  j.view = view_of(shape, q.n, q.K, q.per_activation);
  const View& v = j.view;
  j.xs = strides_of(shape, q.per_activation);
  j.x = q.x.data_ptr();
  if (q.beta) {
    j.beta = q.beta->data_ptr();
    j.beta_step = q.beta->dim() > 0;
  }
  j.beta_value = q.beta_value, j.beta_min = q.beta_min, j.form = q.form, j.factor = q.factor;
  const bool loss = q.form != Form::none, sum_dbeta = q.beta_grad && !j.beta_step && q.reduce;
  if (want_dx) {
    out.dx = empty_dense(q.x, shape);
    const Shape to(*out.dx);
    j.ds = strides_of(to, q.per_activation);
    j.dx = out.dx->data_ptr();
    j.stream = v.N * v.U * v.P * bytes(t) >= kStreamBytes && aligned_rows(j.dx, v, j.ds, bytes(t));
  }
  const auto per_unit = [&](int64_t K) { return empty_units(shape, q.per_activation, K, v.U, acc); };
  if (loss && !q.reduce) j.loss = (out.loss = per_unit(0))->data_ptr();
  if (q.beta_grad && !sum_dbeta) j.dbeta = (out.dbeta = per_unit(0))->data_ptr();
  if (want_moments) j.mean = (out.mean = per_unit(v.K))->data_ptr();
  if (want_moments && !loss) j.var = (out.var = per_unit(v.K))->data_ptr();
  if (want_scale) j.scale = (out.scale = per_unit(v.K))->data_ptr();

  const Kernels kernels = kernels_for(t);
  const int64_t sample = v.K * v.n * v.P;
  j.block = block_units(v, bytes(t));
  int64_t blocks = (v.U + j.block - 1) / j.block;
  // Too few blocks to share, or contiguous units whose samples are long: pieces in memory order instead.
  const bool split = !want_dx && v.U * sample >= kSerial &&
                     (blocks < 2 * int64_t(torch::stable::get_num_threads()) || (!v.spatial && v.P > 1));
  if (split) j.block = 64, blocks = (v.U + 63) / 64;
  std::vector<double> sums(loss ? 2 * blocks : 0);
  if (loss && q.reduce) j.loss_sum = sums.data();
  if (sum_dbeta) j.dbeta_sum = sums.data() + blocks;
  if (split) {
    const int64_t tasks = v.K * Pieces(v, piece_values(v)).size();
    Tensor partial = empty_vector(2 * tasks * round_up(v.U, 16) * 8, aoti_torch_dtype_uint8());
    j.piece_mean = partial.data_ptr();
    j.piece_m2 = (char*)j.piece_mean + tasks * round_up(v.U, 16) * 8;
    parallel(tasks, v.U * sample / tasks, [&](int64_t b, int64_t e) { kernels.pieces(j, b, e); });
    parallel(blocks, 64 * tasks, [&](int64_t b, int64_t e) { kernels.finish(j, b, e); });
  } else {
    parallel(blocks, j.block * sample, [&](int64_t b, int64_t e) { kernels.blocks(j, b, e); });
  }
  const auto total = [&](const double* part) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += part[b];
    return scalar(acc, t, sum);
  };
  if (j.loss_sum) out.loss = total(j.loss_sum);
  if (j.dbeta_sum) out.dbeta = total(j.dbeta_sum);
  else if (!q.beta_grad) out.dbeta = empty_vector(0, acc);
  return out;
}

// ---- ops

Tensor loss(const Tensor& x, const std::optional<Tensor>& beta, double beta_value, double beta_min, int64_t n,
            int64_t K, int64_t form, bool per_activation, double factor, bool reduce) {
  return *run({x, beta, beta_value, beta_min, n, K, Form(form), per_activation, factor, reduce, false}, false, false,
              false)
              .loss;
}

std::tuple<Tensor, Tensor, Tensor> loss_dx(const Tensor& x, const std::optional<Tensor>& beta, double beta_value,
                                           double beta_min, int64_t n, int64_t K, int64_t form, bool per_activation,
                                           double factor, bool reduce, bool beta_grad) {
  Results r = run({x, beta, beta_value, beta_min, n, K, Form(form), per_activation, factor, reduce, beta_grad}, true,
                  false, false);
  return {*r.loss, *r.dx, *r.dbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_coefficients(const Tensor& x, const std::optional<Tensor>& beta,
                                                             double beta_value, double beta_min, int64_t n, int64_t K,
                                                             int64_t form, bool per_activation, double factor,
                                                             bool reduce, bool beta_grad) {
  Results r = run({x, beta, beta_value, beta_min, n, K, Form(form), per_activation, factor, reduce, beta_grad}, false,
                  true, true);
  return {*r.loss, *r.mean, *r.scale, *r.dbeta};
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, int64_t n, int64_t K, bool per_activation) {
  const std::optional<Tensor> none;
  Results r = run({x, none, 0, 0, n, K, Form::none, per_activation, 1, false, false}, false, true, false);
  return {*r.mean, *r.var};
}

Tensor moments_dx(const Tensor& x, const Tensor& mean, const Tensor& scale, const std::optional<Tensor>& shift,
                  int64_t n, int64_t rows, bool per_activation) {
  const DType t = dtype_of(x);
  Shape shape(x);
  Job j{};
  j.xs = strides_of(shape, per_activation);
  j.x = x.data_ptr();
  j.view = view_of(shape, n, mean.size(0), per_activation);
  j.view.N = rows;
  // dx: dense, rows of the same inner layout as x
  if (rows != shape.sizes[0]) shape.sizes[0] = rows, shape.strides[0] = j.view.U * j.view.P;
  const Tensor dx = empty_dense(x, shape);
  const Shape to(dx);
  j.ds = strides_of(to, per_activation);
  j.dx = dx.data_ptr();
  j.mean = mean.data_ptr();
  j.scale = scale.data_ptr();
  j.shift = shift ? shift->data_ptr() : nullptr;
  const int64_t row = j.view.U * j.view.P;
  j.stream = rows * row * bytes(t) >= kStreamBytes && aligned_rows(j.dx, j.view, j.ds, bytes(t));
  const Kernels kernels = kernels_for(t);
  parallel(rows, row, [&](int64_t b, int64_t e) { kernels.rows(j, b, e); });
  return dx;
}

}  // namespace
}  // namespace vcl

STABLE_TORCH_LIBRARY_IMPL(vcl_kernels, CPU, m) {
  m.impl("loss", TORCH_BOX(&vcl::loss));
  m.impl("loss_dx", TORCH_BOX(&vcl::loss_dx));
  m.impl("loss_coefficients", TORCH_BOX(&vcl::loss_coefficients));
  m.impl("moments", TORCH_BOX(&vcl::moments));
  m.impl("moments_dx", TORCH_BOX(&vcl::moments_dx));
}

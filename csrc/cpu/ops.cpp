// The CPU backend of the ops that vcl_kernels/ops.py defines: reads shapes, allocates results, cuts the work
// into tasks. LibTorch stable ABI only.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>
#pragma GCC diagnostic pop

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
  int64_t dim = 0, sizes[8], strides[8];
  Shape() = default;
  explicit Shape(const Tensor& t) : dim(t.dim()) {
    STD_TORCH_CHECK(dim <= 8, "at most 8 dimensions are supported, got ", dim);
    const auto s = t.sizes(), d = t.strides();
    for (int64_t i = 0; i < dim; ++i) sizes[i] = s[i], strides[i] = d[i];
  }

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

Strides strides_of(const Shape& s, bool per_activation) {
  int64_t pos = 0;
  for (int64_t i = 2; i < s.dim; ++i) {
    if (s.sizes[i] > 1 && (pos == 0 || s.strides[i] < pos)) pos = s.strides[i];
  }
  if (pos == 0) pos = 1;
  return per_activation ? Strides{s.strides[0], 1, 1} : Strides{s.strides[0], s.strides[1], pos};
}

View view_of(const Shape& s, int64_t n, int64_t K, bool per_activation) {
  STD_TORCH_CHECK(n >= 1 && K >= 0 && K <= s.sizes[0] / n, K, " sub-batches of ", n, " samples want more than the ",
                  s.sizes[0], " rows of x");
  const int64_t inner = s.count(2);
  if (per_activation) return {s.sizes[0], K, n, s.sizes[1] * inner, 1, false};
  const bool spatial = inner > 1 && strides_of(s, false).pos == 1;
  return {s.sizes[0], K, n, s.sizes[1], inner, spatial};
}

// x, or a contiguous copy where its strides fit neither layout (geometry.in_layout): a compiler chooses them too.
Tensor in_layout(const Tensor& x, bool per_activation) {
  const Shape s(x);
  STD_TORCH_CHECK(s.dim >= 2, "x must have 2 to 8 dimensions, got ", s.dim);
  if (per_activation) return s.fill(1, 1) ? x : torch::stable::contiguous(x);
  const int64_t C = s.sizes[1], P = s.count(2), step = strides_of(s, false).pos;
  const bool spatial = step == 1 && P > 1 && (C == 1 || s.strides[1] >= P);
  const bool unit = C == 1 || (s.strides[1] == 1 && (P == 1 || step >= C));
  return s.fill(2, step) && (spatial || unit) ? x : torch::stable::contiguous(x);
}

Tensor empty(const Shape& s, int32_t dtype) {
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(s.dim, s.sizes, s.strides, dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

Tensor empty_vector(int64_t size, int32_t dtype) {
  Shape s;
  s.add(size, 1);
  return empty(s, dtype);
}

Tensor scalar(int32_t dtype, DType t, double value) {
  Tensor out = empty(Shape(), dtype);
  if (t == DType::f64) *(double*)out.data_ptr() = value;
  else *(float*)out.data_ptr() = float(value);
  return out;
}

int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// N samples one after another, each laid out as x's are (geometry.empty_rows). (empty_like goes through a look-up by
// name, dearer than a small loss.)
Shape rows_as(const Tensor& x, Shape s, int64_t N) {
  if (!s.fill(1, 1)) {
    Tensor first = x;
    s = Shape(torch::stable::empty_like(torch::stable::narrow(first, 0, 0, 1)));
  }
  s.sizes[0] = N, s.strides[0] = s.count(1);
  return s;
}

// One value for each unit, and with K > 0 for each sub-batch, in the memory order of x's units.
Shape units_as(const Shape& x, bool per_activation, int64_t K) {
  Shape s;
  if (K) s.add(K, per_activation ? x.count(1) : x.sizes[1]);
  if (!per_activation) s.add(x.sizes[1], 1);
  for (int64_t i = 1; per_activation && i < x.dim; ++i) s.add(x.sizes[i], x.strides[i]);
  return s;
}

// t, or a copy of it that lies as `wanted`.
Tensor laid_out(const Tensor& t, const Shape& wanted) {
  if (Shape(t).lies_as(wanted)) return t;
  Tensor copy = empty(wanted, dtype_code(t));
  torch::stable::copy_(copy, t);
  return copy;
}

// t, one value or one for each unit (and each sub-batch before it), in x's order of units (geometry.in_unit_order).
Tensor in_unit_order(const Tensor& t, const Shape& x, bool per_activation) {
  const int64_t units = per_activation ? x.dim - 1 : 1;
  if (t.dim() == 0) return t;
  const Shape wanted = units_as(x, per_activation, t.dim() > units ? t.size(0) : 0);
  STD_TORCH_CHECK(t.numel() == wanted.count(0), "a tensor of one value for each unit must have ", wanted.count(0),
                  " of them, got ", t.numel());
  return laid_out(t, wanted);
}

// ---- tasks

constexpr int64_t kSerial = 32768;         // elements under which starting threads costs more than it gains
constexpr int64_t kBlockBytes = 512 << 10; // of x in a block of units: it is read again from L2
constexpr int64_t kUnitBlockBytes = 256 << 10;  // where units are contiguous: rows far apart share few cache sets
// From these sizes on, stores bypass the caches: a gradient made in forward is long cold when it is wanted; what the
// next layer reads at once may still lie in L3.
constexpr int64_t kStreamLater = 4 << 20;
constexpr int64_t kStreamNext = 16 << 20;
constexpr int64_t kJoinedRun = 8192;       // values in a run of units, with their coefficients in cache
constexpr int64_t kColumnBytes = 256 << 10; // of x in a column of a piece: its activation finds it in L2
constexpr int64_t kPieceMoments = 4 << 20; // bytes of the moments of pieces that may exceed half of x
constexpr int64_t kFinish = 8;             // elements whose pass takes as long as a unit's coefficients, per piece

template <class F> void parallel(int64_t tasks, int64_t elements_per_task, const F& f) {
  if (tasks * elements_per_task < kSerial) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kSerial / 2 / std::max<int64_t>(1, elements_per_task)), f);
}

// Two kinds of tasks at once, of each of which every thread takes the same share.
template <class F, class G>
void parallel_both(int64_t a, const F& f, int64_t b, const G& g, int64_t elements) {
  const int64_t shares = elements < kSerial ? 1 : torch::stable::get_num_threads();
  const auto share = [&](int64_t begin, int64_t end) {
    f(a * begin / shares, a * end / shares);
    g(b * begin / shares, b * end / shares);
  };
  if (shares == 1) return share(0, 1);
  torch::stable::parallel_for(0, shares, 1, share);
}

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Units in a block: as many as stay in L2; contiguous units at least 256 bytes wide. Spatial units that do not end
// on a vector are taken in sixteens where the results are streamed, so that every block begins on one.
int64_t block_units(const View& v, int64_t size) {
  const int64_t sample = std::max<int64_t>(1, v.K * v.n * v.P * size);
  if (!v.spatial) return std::clamp<int64_t>(kUnitBlockBytes / sample / 64 * 64, 64, 1024);
  const int64_t fit = std::clamp<int64_t>(kBlockBytes / sample, 1, std::max<int64_t>(1, v.U / 16));
  const bool sixteens = v.P % 16 && v.P * 16 <= kJoinedRun && v.N * v.U * v.P * size >= kStreamLater;
  return sixteens ? round_up(fit, 16) : fit;
}

// Whether the result is large, and begins on a whole vector wherever a row does, and a run of values in it.
bool streams(const Job& j, const void* result, int64_t run, int64_t size, int64_t least) {
  const View& v = j.view;
  return v.N * v.U * v.P * size >= least &&
         (reinterpret_cast<uintptr_t>(result) | j.ds.row * size | run * size) % 64 == 0;
}

// The run that a block of units writes at a time.
int64_t block_run(const Job& j) {
  if (j.joined) return j.block * j.view.P;
  if (j.view.P == 1) return j.view.U;
  return j.view.spatial ? j.ds.unit | j.view.P : j.ds.pos | j.view.U;
}

struct Request {
  Tensor x;
  std::optional<Tensor> beta;
  double beta_value, beta_min;
  int64_t n, K;
  Form form;
  bool per_activation;
  double factor;
  bool reduce, beta_grad;
  Activation activation = Activation::identity;
  double parameter = 0;
  bool keep_rows = false;
};

struct Results {
  std::optional<Tensor> loss, dbeta, dx, mean, var, scale, y, rows;
};

enum class Want { loss, dx, moments, coefficients, activation };

// Moments, or with a form the loss, and what else is wanted.
Results run(Request q, Want want) {
  const bool want_dx = want == Want::dx, want_y = want == Want::activation, keep_rows = q.keep_rows;
  const bool want_scale = want_y || want == Want::coefficients, want_mean = want_scale || want == Want::moments;
  const DType t = dtype_of(q.x);
  q.x = in_layout(q.x, q.per_activation);
  const Shape shape(q.x);
  if (q.beta) q.beta = in_unit_order(*q.beta, shape, q.per_activation);
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
    const Shape to = rows_as(q.x, shape, v.N);
    out.dx = empty(to, dtype_code(q.x));
    j.ds = strides_of(to, q.per_activation);
    j.dx = out.dx->data_ptr();
  }
  const auto rows = [&](int64_t N) { return empty(rows_as(q.x, shape, N), dtype_code(q.x)); };
  if (want_scale) out.rows = keep_rows ? rows(v.K * v.n) : empty_vector(0, dtype_code(q.x));
  if (want_y) out.y = rows(v.N);
  const bool writes_y = want_y || (want_scale && keep_rows);
  if (writes_y) {  // the rows alone: the identity of those that take part
    const Tensor& y = want_y ? *out.y : *out.rows;
    j.ds = strides_of(Shape(y), q.per_activation);
    j.y = y.data_ptr();
    j.rows = want_y && keep_rows ? out.rows->data_ptr() : nullptr;
    j.activation = q.activation, j.parameter = q.parameter;
  }
  j.block = block_units(v, bytes(t));
  // A gradient only where units do not end on a vector: its coefficients must be spread out.
  j.joined = (want_dx ? v.P % 16 != 0 : writes_y) && v.spatial && j.xs.unit == v.P && j.ds.unit == v.P &&
             v.P <= piece_values(v) && j.block * v.P <= kJoinedRun;
  j.stream = (want_dx && streams(j, j.dx, block_run(j), bytes(t), kStreamLater)) ||
             (want_y && streams(j, j.y, block_run(j), bytes(t), kStreamNext));
  const auto per_unit = [&](int64_t K) { return empty(units_as(shape, q.per_activation, K), acc); };
  if (loss && !q.reduce) j.loss = (out.loss = per_unit(0))->data_ptr();
  if (q.beta_grad && !sum_dbeta) j.dbeta = (out.dbeta = per_unit(0))->data_ptr();
  if (want_mean) j.mean = (out.mean = per_unit(v.K))->data_ptr();
  if (want == Want::moments) j.var = (out.var = per_unit(v.K))->data_ptr();
  if (want_scale) j.scale = (out.scale = per_unit(v.K))->data_ptr();

  const Kernels kernels = kernels_for(t);
  const int64_t sample = v.K * v.n * v.P;
  int64_t blocks = (v.U + j.block - 1) / j.block;
  // Too few blocks to share, or contiguous units, whose samples lie far apart: pieces in memory order instead, unless
  // their moments are much beside x.
  const int64_t tasks = v.K * Pieces(v, piece_values(v)).size();
  const int64_t kept = tasks > v.K ? 2 : 1;  // of a piece: m2, and its mean unless that is the sub-batch's
  const bool in_order =
      !v.spatial && kept * tasks * v.U * 8 <= std::max(kPieceMoments, v.U * sample * bytes(t) / 2);
  const bool split = !want_dx && v.U * sample >= kSerial &&
                     (in_order || blocks < 2 * int64_t(torch::stable::get_num_threads()));
  if (split) j.block = 64, blocks = (v.U + 63) / 64;
  std::vector<double> sums(loss ? 2 * blocks : 0);
  if (loss && q.reduce) j.loss_sum = sums.data();
  if (sum_dbeta) j.dbeta_sum = sums.data() + blocks;
  const int64_t first = v.K * v.n, rest = want_y ? v.N - first : 0;  // rows whose activation alone is wanted
  const int64_t elements = v.U * (sample + rest * v.P);
  const auto activations = [&](int64_t b, int64_t e) { kernels.activations(j, first + b, first + e); };
  if (split) {
    const int64_t all = tasks * round_up(v.U, 16);
    Tensor partial = empty_vector(kept * all, aoti_torch_dtype_float64());
    j.piece_m2 = partial.data_ptr();
    if (kept == 2) j.piece_mean = (double*)j.piece_m2 + all;
    const int64_t piece_bytes = sample / tasks * bytes(t);  // of a unit
    j.column = std::clamp<int64_t>(kColumnBytes / piece_bytes / 64 * 64, 64, std::max<int64_t>(64, v.U));
    const int64_t columns = (v.U + j.column - 1) / j.column;
    parallel_both(tasks * columns, [&](int64_t b, int64_t e) { kernels.pieces(j, b, e); }, rest, activations, elements);
    parallel(blocks, kFinish * j.block * tasks, [&](int64_t b, int64_t e) { kernels.finish(j, b, e); });
  } else {
    parallel_both(blocks, [&](int64_t b, int64_t e) { kernels.blocks(j, b, e); }, rest, activations, elements);
  }
  const auto total = [&](const double* part) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += part[b];
    return scalar(acc, t, sum);
  };
  if (j.loss_sum) out.loss = total(j.loss_sum);
  if (j.dbeta_sum) out.dbeta = total(j.dbeta_sum);
  if (j.dbeta_sum && j.beta) {
    const double given = t == DType::f64 ? *(const double*)j.beta : *(const float*)j.beta;
    const bool positive = t == DType::f64 ? *(double*)out.dbeta->data_ptr() > 0 : *(float*)out.dbeta->data_ptr() > 0;
    if (given < j.beta_min && positive) out.dbeta = scalar(acc, t, 0);  // forms.h: it may only rise
  }
  if (!q.beta_grad) out.dbeta = empty_vector(0, acc);
  return out;
}

// ---- ops

Tensor loss(const Tensor& x, const std::optional<Tensor>& beta, double beta_value, double beta_min, int64_t n,
            int64_t K, int64_t form, bool per_activation, double factor, bool reduce) {
  return *run({x, beta, beta_value, beta_min, n, K, Form(form), per_activation, factor, reduce, false},
              Want::loss)
              .loss;
}

std::tuple<Tensor, Tensor, Tensor> loss_dx(const Tensor& x, const std::optional<Tensor>& beta, double beta_value,
                                           double beta_min, int64_t n, int64_t K, int64_t form, bool per_activation,
                                           double factor, bool reduce, bool beta_grad) {
  Results r = run({x, beta, beta_value, beta_min, n, K, Form(form), per_activation, factor, reduce, beta_grad},
                  Want::dx);
  return {*r.loss, *r.dx, *r.dbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_coefficients(
    const Tensor& x, const std::optional<Tensor>& beta, double beta_value, double beta_min, int64_t n, int64_t K,
    int64_t form, bool per_activation, double factor, bool reduce, bool beta_grad, bool keep_rows) {
  Results r = run({x, beta, beta_value, beta_min, n, K, Form(form), per_activation, factor, reduce, beta_grad,
                   Activation::identity, 0, keep_rows},
                  Want::coefficients);
  return {*r.loss, *r.mean, *r.scale, *r.dbeta, *r.rows};
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, int64_t n, int64_t K, bool per_activation) {
  const std::optional<Tensor> none;
  Results r = run({x, none, 0, 0, n, K, Form::none, per_activation, 1, false, false}, Want::moments);
  return {*r.mean, *r.var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activation(
    const Tensor& x, const std::optional<Tensor>& beta, double beta_value, double beta_min, int64_t n, int64_t K,
    int64_t form, bool per_activation, double factor, bool reduce, bool beta_grad, int64_t activation, double parameter,
    bool keep_rows) {
  Results r = run({x, beta, beta_value, beta_min, n, K, Form(form), per_activation, factor, reduce, beta_grad,
                   Activation(activation), parameter, keep_rows},
                  Want::activation);
  return {*r.y, *r.loss, *r.mean, *r.scale, *r.dbeta, *r.rows};
}

// The tensors that dx is made of.
struct Upstream {
  std::optional<Tensor> saved, rows, dy, mean, scale, shift, g;
};

// dx of N rows, laid out as what was saved; the caller has set what is not a tensor.
Tensor gradients(Job& j, Upstream u, int64_t n, int64_t N, bool per_activation) {
  const auto data_of = [](const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; };
  const Tensor like = in_layout(u.saved ? *u.saved : *u.rows, per_activation);
  if (u.saved) u.saved = like;
  const DType t = dtype_of(like);
  const Shape shape(like), to = rows_as(like, shape, N);
  if (u.rows) u.rows = laid_out(*u.rows, rows_as(like, shape, u.rows->size(0)));
  if (u.dy) u.dy = laid_out(*u.dy, to);  // it may be expanded, or in another memory format
  for (std::optional<Tensor>* of : {&u.mean, &u.scale, &u.shift}) {
    if (*of) *of = in_unit_order(**of, shape, per_activation);
  }
  STD_TORCH_CHECK(N >= n * u.mean->size(0) && (!u.dy || (u.dy->size(0) == N && (!u.saved || shape.sizes[0] == N))),
                  "dy, dx and what was saved must have the same rows, and no fewer than take part, got N = ", N);
  const Tensor dx = empty(to, dtype_code(like));
  j.view = view_of(shape, n, u.mean->size(0), per_activation);
  j.view.N = N;
  j.xs = strides_of(shape, per_activation);
  j.ds = strides_of(to, per_activation);
  j.x = data_of(u.saved);
  j.rows = data_of(u.rows);
  j.dy = data_of(u.dy);
  j.mean = data_of(u.mean);
  j.scale = data_of(u.scale);
  j.shift = data_of(u.shift);
  j.g = data_of(u.g);
  j.dx = dx.data_ptr();
  j.stream = streams(j, j.dx, run_length(j.view, j.xs), bytes(t), j.dy ? kStreamNext : kStreamLater);
  const Kernels kernels = kernels_for(t);
  parallel(N, j.view.U * j.view.P, [&](int64_t b, int64_t e) { kernels.gradients(j, b, e); });
  return dx;
}

Tensor moments_dx(const Tensor& x, const Tensor& mean, const Tensor& scale, const std::optional<Tensor>& shift,
                  const std::optional<Tensor>& g, int64_t n, int64_t N, bool per_activation) {
  Job j{};
  return gradients(j, {x, std::nullopt, std::nullopt, mean, scale, shift, g}, n, N, per_activation);
}

Tensor activation_dx(const std::optional<Tensor>& saved, bool from_output, const std::optional<Tensor>& rows,
                     const std::optional<Tensor>& dy, const Tensor& mean, const Tensor& scale,
                     const std::optional<Tensor>& g, int64_t n, int64_t N, bool per_activation, int64_t activation,
                     double parameter) {
  Job j{};
  j.activation = Activation(activation), j.parameter = parameter, j.from_output = from_output;
  const std::optional<Tensor> of_loss = g ? std::optional(scale) : std::nullopt;
  return gradients(j, {saved, rows, dy, mean, of_loss, std::nullopt, g}, n, N, per_activation);
}

}  // namespace
}  // namespace vcl

STABLE_TORCH_LIBRARY_IMPL(vcl_kernels, CPU, m) {
  m.impl("loss", TORCH_BOX(&vcl::loss));
  m.impl("loss_dx", TORCH_BOX(&vcl::loss_dx));
  m.impl("loss_coefficients", TORCH_BOX(&vcl::loss_coefficients));
  m.impl("moments", TORCH_BOX(&vcl::moments));
  m.impl("activation", TORCH_BOX(&vcl::activation));
  m.impl("activation_dx", TORCH_BOX(&vcl::activation_dx));
  m.impl("moments_dx", TORCH_BOX(&vcl::moments_dx));
}

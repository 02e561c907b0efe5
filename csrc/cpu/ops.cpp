// The CPU backend of the ops that vcl_kernels/ops.py defines. Forward plans, allocates and executes.
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "plan.h"
#include "tensors.h"

namespace vcl {
namespace {

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

template <class T> Kernels<T> kernels_for() {
  static const int best = best_instruction_set();
#if defined(__x86_64__)
  if (best == 2) return avx512::kernels<T>();
  if (best == 1) return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

template <class F> void parallel(int64_t tasks, int64_t elements_per_task, const F& f) {
  if (tasks * elements_per_task < kSerial) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kSerial / 2 / std::max<int64_t>(1, elements_per_task)), f);
}

// Two sets of tasks at once; every thread takes the same share of each.
template <class F, class G> void parallel_both(int64_t a, const F& f, int64_t b, const G& g, int64_t elements) {
  const int64_t shares = elements < kSerial ? 1 : torch::stable::get_num_threads();
  const auto share = [&](int64_t begin, int64_t end) {
    f(a * begin / shares, a * end / shares);
    g(b * begin / shares, b * end / shares);
  };
  if (shares == 1) share(0, 1);
  else torch::stable::parallel_for(0, shares, 1, share);
}

// ---- forward

struct Results { MaybeTensor loss, dbeta, dx, y, mean, var, scale, rows; };

// All results but sums over units: new tensors, which the job points to. `written`: the shape of dx, y or rows.
template <class T>
Results allocate(ForwardJob<T>& j, const Tensor& x, const Shape& shape, const Shape& written, const Request& q) {
  using A = acc_t<T>;
  const int32_t dtype = dtype_code(x), acc = dtype_code<A>();
  const auto new_rows = [&](MaybeTensor& to, int64_t N) { return data<T>(to = empty(rows_as(x, written, N), dtype)); };
  const auto new_units = [&](MaybeTensor& to, int64_t K) {
    return data<A>(to = empty(units_as(shape, q.spec.sub_batches.per_activation, K), acc));
  };
  Results r;
  if (q.want == Want::dx) j.dx = new_rows(r.dx, j.g.N);
  if (q.want == Want::activation) j.y = new_rows(r.y, j.g.N);
  if (q.keep_rows) (j.y ? j.rows : j.y) = new_rows(r.rows, j.g.rows_with_loss());
  else if (q.wants_coefficients()) r.rows = empty_vector(0, dtype);
  if (q.wants_loss() && !q.spec.reduce) j.loss.loss = new_units(r.loss, 0);
  if (!q.beta_grad) r.dbeta = empty_vector(0, acc);
  else if (!j.loss.dbeta_sums) j.loss.dbeta = new_units(r.dbeta, 0);
  if (q.want == Want::moments || q.wants_coefficients()) j.loss.coefficients.mean = new_units(r.mean, j.g.K);
  if (q.wants_coefficients()) j.loss.coefficients.scale = new_units(r.scale, j.g.K);
  if (q.want == Want::moments) j.loss.var = new_units(r.var, j.g.K);
  return r;
}

template <class T> void execute(ForwardJob<T>& j) {
  const Plan& p = j.plan;
  const Kernels<T> kernels = kernels_for<T>();
  const auto tasks = [&j](auto* kernel, int64_t first = 0) {
    return [&j, kernel, first](int64_t begin, int64_t end) { kernel(j, first + begin, first + end); };
  };
  const auto activate = tasks(kernels.activate, j.g.rows_with_loss());
  if (!p.split) return parallel_both(p.blocks, tasks(kernels.blocks), p.rest, activate, p.elements);
  const int64_t all = p.all_parts * divide_up(j.g.U, 16) * 16;
  const Tensor moments = empty_vector(p.moments_per_part * all, dtype_code<double>());
  j.part_m2 = data<double>(moments);
  if (p.moments_per_part == 2) j.part_mean = j.part_m2 + all;
  const int64_t part_blocks = p.all_parts * divide_up(j.g.U, p.part_block_units);
  parallel_both(part_blocks, tasks(kernels.parts), p.rest, activate, p.elements);
  parallel(p.blocks, kFinalise * p.block_units * p.all_parts, tasks(kernels.finalise));
}

template <class T> Results forward(Tensor x, MaybeTensor beta, const Request& q) {
  using A = acc_t<T>;
  const SubBatches& sub_batches = q.spec.sub_batches;
  x = in_layout(x, sub_batches.per_activation);
  const Shape shape = shape_of(x);
  const Shape written = q.want == Want::dx || q.writes_rows() ? rows_as(x, shape, shape.sizes[0]) : shape;
  beta = in_unit_order(beta, shape, sub_batches.per_activation);
  ForwardJob<T> j{};
  j.g = geometry_of(shape, sub_batches);
  j.x = data<T>(x);
  j.loss.spec = q.spec;
  j.loss.beta = data<A>(beta), j.loss.beta_per_unit = beta && beta->dim() > 0;
  j.strides = strides_of(written, sub_batches.per_activation), j.activation = q.activation;

  j.plan = plan_forward(j.g, j.strides, q, sizeof(T), torch::stable::get_num_threads());

  const int64_t blocks = j.plan.blocks;
  std::vector<double> sums(q.spec.reduce ? 2 * blocks : 0);
  if (q.spec.reduce) j.loss.loss_sums = sums.data();
  if (q.spec.reduce && q.beta_grad && !j.loss.beta_per_unit) j.loss.dbeta_sums = sums.data() + blocks;
  Results r = allocate(j, x, shape, written, q);
  j.plan.stream &= aligned(j.dx ? j.dx : j.y);

  execute(j);
  const auto total = [&](const double* of_block) { return std::accumulate(of_block, of_block + blocks, 0.0); };
  if (j.loss.loss_sums) r.loss = scalar<A>(total(j.loss.loss_sums));
  if (j.loss.dbeta_sums) {
    const double dbeta = total(j.loss.dbeta_sums);
    r.dbeta = scalar<A>(beta ? projected_gradient(dbeta, double(*j.loss.beta), q.spec.beta_min) : dbeta);
  }
  return r;
}

Results forward(const Tensor& x, const MaybeTensor& beta, const Request& q) {
  return with_dtype(x, [&](auto number) { return forward<decltype(number)>(x, beta, q); });
}

// ---- backward

struct BackwardRequest {
  Tensor saved;
  MaybeTensor rows, dy, g;  // g: the upstream gradient of the loss, one value
  Coefficients<MaybeTensor> coefficients;
  int64_t n, N;
  bool per_activation, from_output;
  ActivationSpec activation;
};

// dx of N rows, laid out as what was saved.
template <class T> Tensor backward(BackwardRequest q) {
  using A = acc_t<T>;
  q.saved = in_layout(q.saved, q.per_activation);
  const Shape shape = shape_of(q.saved), to = rows_as(q.saved, shape, q.N);
  auto& [mean, scale, shift] = q.coefficients;
  if (q.rows) q.rows = laid_out(*q.rows, rows_as(q.saved, shape, q.rows->size(0)));
  if (q.dy) q.dy = laid_out(*q.dy, to);  // it may be expanded, or in another memory format
  for (MaybeTensor* of : {&mean, &scale, &shift}) *of = in_unit_order(*of, shape, q.per_activation);
  const int64_t K = mean->size(0), N = q.N;
  STD_TORCH_CHECK(N >= q.n * K && (!q.dy || (q.dy->size(0) == N && shape.sizes[0] == N)),
                  "dy, dx and what was saved must have the same rows, and no fewer than take part, got N = ", N);
  const Tensor dx = empty(to, dtype_code(q.saved));
  BackwardJob<T> j{};
  j.g = geometry_of(shape, {q.n, K, q.per_activation}), j.g.N = N;
  j.saved = data<T>(q.saved), j.rows = data<T>(q.rows), j.dy = data<T>(q.dy), j.dx = data<T>(dx);
  j.from_output = q.from_output, j.activation = q.activation;
  j.coefficients = {data<A>(mean), data<A>(scale), data<A>(shift)};
  j.upstream = q.g ? *data<A>(q.g) : A(1);
  j.strides = strides_of(to, q.per_activation);
  j.stream = streams(j.g, j.strides.row, j.g.run(), sizeof(T), q.dy.has_value()) && aligned(j.dx);
  const auto kernel = kernels_for<T>().backward;
  parallel(N, j.g.row_values(), [&](int64_t begin, int64_t end) { kernel(j, begin, end); });
  return dx;
}

Tensor backward(const BackwardRequest& q) {
  return with_dtype(q.saved, [&](auto number) { return backward<decltype(number)>(q); });
}

// ---- ops: plain arguments become values at once

template <class E> E enumerator(const char* name, int64_t value, int count) {
  STD_TORCH_CHECK(value >= 0 && value < count, name, " must be from 0 to ", count - 1, ", got ", value);
  return static_cast<E>(value);
}

LossSpec spec_of(double beta_value, double beta_min, int64_t n, int64_t K, int64_t form, bool per_activation,
                 double factor, bool reduce) {
  return {beta_value, beta_min, {n, K, per_activation}, enumerator<Form>("form", form, kForms), factor, reduce};
}

Tensor loss(const Tensor& x, const MaybeTensor& beta, double beta_value, double beta_min, int64_t n, int64_t K,
            int64_t form, bool per_activation, double factor, bool reduce) {
  return *forward(x, beta, {Want::loss, spec_of(beta_value, beta_min, n, K, form, per_activation, factor, reduce)})
              .loss;
}

std::tuple<Tensor, Tensor, Tensor> loss_dx(const Tensor& x, const MaybeTensor& beta, double beta_value, double beta_min,
                                           int64_t n, int64_t K, int64_t form, bool per_activation, double factor,
                                           bool reduce, bool beta_grad) {
  const auto spec = spec_of(beta_value, beta_min, n, K, form, per_activation, factor, reduce);
  const Results r = forward(x, beta, {Want::dx, spec, beta_grad});
  return {*r.loss, *r.dx, *r.dbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_coefficients(const Tensor& x, const MaybeTensor& beta,
                                                                     double beta_value, double beta_min, int64_t n,
                                                                     int64_t K, int64_t form, bool per_activation,
                                                                     double factor, bool reduce, bool beta_grad,
                                                                     bool keep_rows) {
  const auto spec = spec_of(beta_value, beta_min, n, K, form, per_activation, factor, reduce);
  const Results r = forward(x, beta, {Want::coefficients, spec, beta_grad, keep_rows});
  return {*r.loss, *r.mean, *r.scale, *r.dbeta, *r.rows};
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, int64_t n, int64_t K, bool per_activation) {
  LossSpec spec{};
  spec.sub_batches = {n, K, per_activation};
  const Results r = forward(x, std::nullopt, {Want::moments, spec});
  return {*r.mean, *r.var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> activation(const Tensor& x, const MaybeTensor& beta,
                                                                      double beta_value, double beta_min, int64_t n,
                                                                      int64_t K, int64_t form, bool per_activation,
                                                                      double factor, bool reduce, int64_t activation,
                                                                      double parameter, bool beta_grad,
                                                                      bool keep_rows) {
  const auto spec = spec_of(beta_value, beta_min, n, K, form, per_activation, factor, reduce);
  const ActivationSpec function{enumerator<Activation>("activation", activation, kActivations), parameter};
  const Results r = forward(x, beta, {Want::activation, spec, beta_grad, keep_rows, function});
  return {*r.y, *r.loss, *r.mean, *r.scale, *r.dbeta, *r.rows};
}

Tensor moments_dx(const Tensor& x, const Tensor& mean, const Tensor& scale, const MaybeTensor& shift,
                  const MaybeTensor& g, int64_t n, int64_t, bool per_activation, int64_t N) {
  BackwardRequest q{};
  q.saved = x, q.g = g, q.coefficients = {mean, scale, shift};
  q.n = n, q.N = N, q.per_activation = per_activation;
  return backward(q);
}

Tensor activation_dx(const Tensor& saved, const MaybeTensor& rows, bool from_output, const MaybeTensor& dy,
                     const Tensor& mean, const Tensor& scale, const MaybeTensor&, const MaybeTensor& g,
                     int64_t activation, double parameter, int64_t n, int64_t, bool per_activation, int64_t N) {
  BackwardRequest q{};
  q.saved = saved, q.from_output = from_output, q.rows = rows;
  q.dy = dy, q.activation = {enumerator<Activation>("activation", activation, kActivations), parameter};
  q.g = g, q.coefficients.mean = mean;
  if (g) q.coefficients.scale = scale;
  q.n = n, q.N = N, q.per_activation = per_activation;
  return backward(q);
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

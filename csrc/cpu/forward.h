// Moments, loss and coefficients of a block of units, and the activation beside them: the tasks of forward.
#pragma once

#include "activations.h"
#include "forms.h"
#include "moments.h"
#include "one_pass.h"

namespace vcl::VCL_ISA {

constexpr int64_t kFewPositions = 12;  // of units whose values fill vectors better side by side
constexpr int64_t kFewValues = 64;     // of such units that are taken at a time
constexpr int64_t kUnitGroup = 4;      // vectors of units that share a pass over a part: 256 bytes of float32

// Scratch of a thread, kept between calls: fresh memory costs more than the arithmetic.
template <class A> inline Vec<A>* scratch(int64_t vectors) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  const int64_t bytes = vectors * 64 + 64;
  if (size < bytes) memory.reset(new char[bytes]()), size = bytes;
  return reinterpret_cast<Vec<A>*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

template <class T> struct Forward {
  using A = acc_t<T>;
  static constexpr int64_t L = lanes<A>, L8 = lanes<double>;
  static constexpr int H = wide_vectors<A>;  // float64 vectors to a vector of units

  const ForwardJob<T>& j;
  const Geometry& g;
  const Parts parts;
  const int64_t S;       // parts of a sub-batch
  const double freedom;  // 1 / (M - 1), of a sample variance
  explicit Forward(const ForwardJob<T>& job)
      : j(job), g(job.g), parts(job.g), S(parts.size()), freedom(1 / (double(job.g.M()) - 1)) {}

  static Vec<double>* vectors_at(double* moments) { return reinterpret_cast<Vec<double>*>(moments); }
  static int64_t vectors(int64_t units) { return (units + L - 1) / L; }
  static int64_t at_most_a_vector(int64_t units) { return units < L ? units : L; }
  const T* x(int64_t i, int64_t u) const { return j.x + g.strides.offset(i, u); }
  Block block(int64_t index, int64_t units) const {
    const int64_t u0 = index * units;
    return {u0, u0 + units < g.U ? u0 + units : g.U};
  }

  // ---- moments of one part for a block of units

  // Start of the next part: of these units, or after their last one of the next block.
  const T* next_part(int64_t k, int64_t s, Block b) const {
    if (s + 1 == S) return k + 1 < g.K ? x((k + 1) * g.n, b.u0) : x(0, b.u1);
    const Part c = parts.at(s + 1);
    return x(k * g.n + c.i0, b.u0) + c.p0 * g.strides.pos;
  }

  static void contiguous_units(const T* base, Strides st, Part c, int64_t units, int64_t ahead, Vec<double>* mean,
                               Vec<double>* m2) {
    int64_t i = 0;
    for (; (i + kUnitGroup) * L <= units; i += kUnitGroup) {
      unit_moments<T, kUnitGroup>(base + i * L, st, c, L, ahead, mean + i * H, m2 + i * H);
    }
    for (; i * L < units; ++i) {
      unit_moments<T, 1>(base + i * L, st, c, at_most_a_vector(units - i * L), ahead, mean + i * H, m2 + i * H);
    }
  }

  // Units of few positions, side by side: moments of each position over the rows, and then Chan's merge of a unit's.
  void few_positions(const T* base, Part c, int64_t units, int64_t ahead, double* mean, double* m2) const {
    const int64_t P = g.P, at_once = kFewValues / P;
    const double rows = double(c.i1 - c.i0), inverse = 1 / double(P);
    const Strides st{g.strides.row, 1, 1};
    Vec<double> position_mean[kFewValues / L * H], position_m2[kFewValues / L * H];
    for (int64_t u = 0; u < units; u += at_once) {
      const int64_t here = units - u < at_once ? units - u : at_once;
      contiguous_units(base + u * P, st, {c.i0, c.i1, 0, 1}, here * P, ahead, position_mean, position_m2);
      for (int64_t i = 0; i < here; ++i) {
        const double *m = values<double>(position_mean) + i * P, *q = values<double>(position_m2) + i * P;
        double offset = 0, squares = 0, within = 0;  // from the pivot m[0]
        for (int64_t p = 0; p < P; ++p) {
          const double d = m[p] - m[0];
          offset += d, squares += d * d, within += q[p];
        }
        mean[u + i] = m[0] + offset * inverse;
        m2[u + i] = within + rows * (squares - offset * offset * inverse);
      }
    }
  }

  void part_moments(int64_t k, int64_t s, Block b, Vec<double>* mean, Vec<double>* m2) const {
    const Part c = parts.at(s);
    const T* base = x(k * g.n, b.u0);
    const int64_t ahead = next_part(k, s, b) - (base + c.i0 * g.strides.row + c.p0 * g.strides.pos);
    if (!g.spatial) return contiguous_units(base, g.strides, c, b.units(), ahead, mean, m2);
    double *unit_mean = values<double>(mean), *unit_m2 = values<double>(m2);
    if (g.P <= kFewPositions && g.strides.unit == g.P) {
      return few_positions(base, c, b.units(), ahead, unit_mean, unit_m2);
    }
    for (int64_t u = 0; u < b.units(); ++u) {
      spatial_moments<T>(base + u * g.strides.unit, g.strides.row, c, ahead, unit_mean + u, unit_m2 + u);
    }
  }

  // The activation and the copied rows of a part; x is still in cache from its moments.
  template <bool stream> void activate_part(int64_t k, int64_t s, Block b) const {
    const Part c = parts.at(s);
    for (int64_t i = k * g.n + c.i0; i < k * g.n + c.i1; ++i) {
      for_runs(j, b, i, c.p0, c.p1, [&](const T* from, int64_t at, int64_t len, int64_t) {
        activate_run<T, stream>(j.activation, from, j.y + i * j.strides.row + at, len);
        if (j.rows) std::memcpy(j.rows + i * g.row_values() + at, from, len * sizeof(T));
      });
    }
  }

  void part(int64_t k, int64_t s, Block b, Vec<double>* mean, Vec<double>* m2) const {
    part_moments(k, s, b, mean, m2);
    if (j.y) with_flag(j.plan.stream, [&](auto stream) { activate_part<stream()>(k, s, b); });
  }

  // ---- from the moments of parts to loss and coefficients, of a vector of units; in float64, because they are few

  // Moments of a sub-batch, whose parts lie `step` vectors apart: returns the mean, and the variance in `var`. Sums are
  // of differences to the pivot m[0], and in order.
  Vec<A> chan_merge(const Vec<double>* mean, const Vec<double>* m2, int64_t step, Wide<A>& var) const {
    Wide<A> all;
    for (int h = 0; h < H; ++h) {
      const Vec<double>*m = mean + h, *q = m2 + h;
      Vec<double> offset = {}, sum = {};
      for (int64_t s = 1; s < S; ++s) offset += double(parts.at(s).count()) * (m[s * step] - m[0]);
      offset /= double(g.M());
      for (int64_t s = 0; s < S; ++s) {
        const Vec<double> d = (m[s * step] - m[0]) - offset;
        sum += q[s * step] + double(parts.at(s).count()) * d * d;
      }
      all[h] = m[0] + offset;
      var[h] = sum * freedom;
    }
    return from_wide<A>(all);
  }

  // The variance where one part is all of a sub-batch; its mean is final.
  VCL_IN_LOOP void variance(const Vec<double>* m2, Wide<A>& var) const {
    for (int h = 0; h < H; ++h) var[h] = m2[h] * freedom;
  }

  void save(A* to, int64_t k, int64_t u, int64_t width, const Vec<A>& from) const {
    if (to) store_up_to<false>(to + k * g.U + u, from, width);
  }

  // The beta of the h-th float64 vector of units from u on.
  Vec<double> beta_of(int64_t u, int64_t width, int h) const {
    if (!j.loss.beta) return broadcast<double>(j.loss.spec.beta_value);
    return to_wide<A>(j.loss.beta_per_unit ? load_up_to(j.loss.beta + u, width) : broadcast<A>(*j.loss.beta), h);
  }

  static double sum_valid(Vec<double> a, int64_t width) {
    double sum = 0;
    for (int64_t i = 0; i < L8 && i < width; ++i) sum += a[i];
    return sum;
  }

  // var[k] becomes scale[k]. `index`: of the block.
  void loss_and_scale(int64_t index, int64_t u, int64_t width, Wide<A>* var) const {
    for (int64_t k = 0; k < g.K && j.loss.var; ++k) save(j.loss.var, k, u, width, from_wide<A>(var[k]));
    if (j.loss.var) return;  // moments alone
    const LossSpec& spec = j.loss.spec;
    const Vec<double> beta_min = broadcast<double>(spec.beta_min);
    Wide<A> beta, loss, dbeta;
    for (int h = 0; h < H; ++h) beta[h] = bounded_beta(beta_of(u, width, h), beta_min);
    loss_of_variances<H>(spec.form, spec.factor * 2 / double(g.M() - 1), g.K, var, beta, loss, dbeta);
    for (int h = 0; h < H; ++h) {
      loss[h] *= spec.factor, dbeta[h] *= spec.factor;
      if (j.loss.beta_per_unit) dbeta[h] = projected_gradient(dbeta[h], beta_of(u, width, h), beta_min);
      if (j.loss.loss_sums) j.loss.loss_sums[index] += sum_valid(loss[h], width - h * L8);
      if (j.loss.dbeta_sums) j.loss.dbeta_sums[index] += sum_valid(dbeta[h], width - h * L8);
    }
    save(j.loss.loss, 0, u, width, from_wide<A>(loss));
    save(j.loss.dbeta, 0, u, width, from_wide<A>(dbeta));
  }

  // ---- tasks

  // Scratch for a block's [K, slots] coefficients, [slots, K] variances and [S, slots] moments, in vectors.
  Vec<A>*mean, *scale, *run_room;  // run_room: for one_pass
  Wide<A>* var;
  Vec<double>*part_mean, *part_m2;

  void take_scratch() {
    const int64_t slots = vectors(j.plan.block_units),
                  run = j.plan.joined ? 2 * vectors(j.plan.block_units * g.P) + 2 : 0;
    mean = scratch<A>(((2 + H) * g.K + 2 * H * S) * slots + run);
    scale = mean + g.K * slots, var = reinterpret_cast<Wide<A>*>(scale + g.K * slots);
    part_mean = var[g.K * slots], part_m2 = part_mean + H * S * slots;
    run_room = scale + (1 + H) * g.K * slots + 2 * H * S * slots;
  }

  void block_moments(Block b, int64_t slots) const {
    for (int64_t k = 0; k < g.K; ++k) {
      for (int64_t s = 0; s < S; ++s) part(k, s, b, part_mean + s * slots * H, part_m2 + s * slots * H);
      for (int64_t i = 0; i < slots; ++i) {
        const Vec<double>*m = part_mean + i * H, *m2 = part_m2 + i * H;
        Wide<A>& v = var[i * g.K + k];
        if (S == 1) variance(m2, v);
        mean[k * slots + i] = S == 1 ? from_wide<A>(m) : chan_merge(m, m2, slots * H, v);
      }
    }
  }

  void block_coefficients(int64_t index, Block b, int64_t slots) const {
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t u = b.u0 + i * L, width = at_most_a_vector(b.u1 - u);
      Wide<A>* v = var + i * g.K;
      loss_and_scale(index, u, width, v);
      for (int64_t k = 0; k < g.K; ++k) {
        scale[k * slots + i] = from_wide<A>(v[k]);
        save(j.loss.coefficients.mean, k, u, width, mean[k * slots + i]);
        save(j.loss.coefficients.scale, k, u, width, scale[k * slots + i]);
      }
    }
  }

  static void blocks(const ForwardJob<T>& j, int64_t begin, int64_t end) {
    Forward f(j);
    f.take_scratch();
    for (int64_t index = begin; index < end; ++index) {
      const Block b = f.block(index, j.plan.block_units);
      const int64_t slots = vectors(b.units());
      f.block_moments(b, slots);
      f.block_coefficients(index, b, slots);
      if (!j.dx) continue;
      with_flag(j.plan.stream, [&](auto stream) { one_pass<T, stream()>(j, b, f.mean, f.scale, slots, f.run_room); });
    }
    if (j.plan.stream) stream_fence();
  }

  static void part_tasks(const ForwardJob<T>& j, int64_t begin, int64_t end) {
    const Forward f(j);
    const int64_t units = j.plan.part_block_units, blocks = (j.g.U + units - 1) / units, step = vectors(j.g.U) * L;
    Vec<double>* final_mean = f.S > 1 ? nullptr : *reinterpret_cast<Wide<A>*>(scratch<A>(H * vectors(units)));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t index = t / blocks, k = index / f.S;
      const Block b = f.block(t % blocks, units);
      const int64_t at = index * step + b.u0;
      Vec<double>* mean = f.S > 1 ? vectors_at(j.part_mean + at) : final_mean;
      f.part(k, index % f.S, b, mean, vectors_at(j.part_m2 + at));
      if (f.S > 1) continue;
      for (int64_t u = b.u0; u < b.u1; u += L, mean += H) {
        f.save(j.loss.coefficients.mean, k, u, at_most_a_vector(b.u1 - u), from_wide<A>(mean));
      }
    }
    if (j.plan.stream) stream_fence();
  }

  static void finalise(const ForwardJob<T>& j, int64_t begin, int64_t end) {
    const Forward f(j);
    const int64_t K = j.g.K, slots = vectors(j.g.U);
    const auto [mean, scale, shift] = j.loss.coefficients;
    Wide<A>* var = reinterpret_cast<Wide<A>*>(scratch<A>(H * K));
    for (int64_t index = begin; index < end; ++index) {
      const Block b = f.block(index, j.plan.block_units);
      for (int64_t u = b.u0; u < b.u1; u += L) {
        const int64_t width = at_most_a_vector(b.u1 - u);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t at = k * f.S * slots * L + u;
          const Vec<double>* m2 = vectors_at(j.part_m2 + at);
          if (f.S == 1) f.variance(m2, var[k]);
          else f.save(mean, k, u, width, f.chan_merge(vectors_at(j.part_mean + at), m2, H * slots, var[k]));
        }
        f.loss_and_scale(index, u, width, var);
        for (int64_t k = 0; k < K && scale; ++k) f.save(scale, k, u, width, from_wide<A>(var[k]));
      }
    }
  }

  static void activate_rows(const ForwardJob<T>& j, int64_t begin, int64_t end) {
    const int64_t run = j.g.run();
    with_flag(j.plan.stream, [&](auto stream) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = j.x + j.g.strides.offset(i, 0);
        T* to = j.y + j.strides.offset(i, 0);
        for (int64_t start = 0; start < j.g.row_values(); start += run, from += j.g.run_stride()) {
          activate_run<T, stream()>(j.activation, from, to + start, run);
        }
      }
    });
    if (j.plan.stream) stream_fence();
  }
};

}  // namespace vcl::VCL_ISA

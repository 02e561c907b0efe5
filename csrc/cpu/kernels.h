// The tasks of job.h, for every dtype. Included by one file for each instruction set, which defines VCL_ISA
// as the namespace and VCL_LEVEL (0 portable, 1 AVX2, 2 AVX-512), and has switched the compiler to that set. (GCC 12
// reads a whole C++ file before its target pragmas: the compiler's own macros do not tell the set.)
#pragma once

namespace vcl::VCL_ISA {

#include "vec.h"
#include "vmath.h"
#include "forms.h"
#include "moments.h"
#include "apply.h"
#include "activations.h"
#include "rows.h"

constexpr int64_t kFewPositions = 12;  // of units whose values fill vectors better side by side
constexpr int64_t kFewUnits = 64;     // their values that are taken at a time
constexpr int64_t kUnitGroup = 4;  // vectors of units that share a pass over a piece: 256 bytes of fp32

// Scratch of a thread, kept between calls: fresh memory costs more than the arithmetic.
template <class A> inline Vec<A>* scratch(int64_t vectors) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  const int64_t bytes = vectors * 64 + 64;
  if (size < bytes) {
    memory.reset(new char[bytes]());
    size = bytes;
  }
  return reinterpret_cast<Vec<A>*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

template <class T> struct Runner {
  using A = acc_t<T>;
  static constexpr int64_t L = lanes<A>;
  static constexpr int H = parts<A>;  // float64 vectors to a vector of units

  const Job& j;
  const View& v;
  const Pieces pieces;
  const double freedom;  // 1 / (M - 1), of a sample variance
  explicit Runner(const Job& job)
      : j(job), v(job.view), pieces(job.view, piece_values(job.view)), freedom(1 / (double(v.n * v.P) - 1)) {}

  static int64_t vectors(int64_t units) { return (units + L - 1) / L; }
  static int64_t clip(int64_t units) { return units < L ? units : L; }
  const T* x(int64_t r, int64_t u) const { return (const T*)j.x + r * j.xs.row + u * j.xs.unit; }
  T* dx(int64_t r, int64_t u) const { return (T*)j.dx + r * j.ds.row + u * j.ds.unit; }

  // ---- moments of one piece for units [u0, u1)

  // Where the piece after this one begins: of the same units, and after their last of the next block.
  const T* next_piece(int64_t k, int64_t s, int64_t u0, int64_t u1) const {
    if (s + 1 == pieces.size()) return k + 1 < v.K ? x((k + 1) * v.n, u0) : x(0, u1);
    const Piece c = pieces.at(v, s + 1);
    return x(k * v.n + c.i0, u0) + c.p0 * (v.spatial ? 1 : j.xs.pos);
  }

  // Contiguous units.
  static void columns(const T* base, Strides st, Piece c, int64_t units, int64_t ahead, Vec<double>* mean,
                      Vec<double>* m2) {
    int64_t g = 0;
    for (; (g + kUnitGroup) * L <= units; g += kUnitGroup) {
      unit_moments<T, kUnitGroup>(base + g * L, st, c, L, ahead, mean + g * H, m2 + g * H);
    }
    for (; g * L < units; ++g) {
      unit_moments<T, 1>(base + g * L, st, c, clip(units - g * L), ahead, mean + g * H, m2 + g * H);
    }
  }

  // Units of few positions, side by side: the moments of each position over the rows, and then
  // Chan's merge of a unit's.
  void few_positions(const T* base, Piece c, int64_t units, int64_t ahead, double* mean, double* m2) const {
    const int64_t P = v.P, at_once = kFewUnits / P;
    const double rows = double(c.i1 - c.i0), inverse = 1 / double(P);
    const Strides st{j.xs.row, 1, 1};
    Vec<double> of_mean[kFewUnits / L * H], of_m2[kFewUnits / L * H];
    for (int64_t u = 0; u < units; u += at_once) {
      const int64_t here = units - u < at_once ? units - u : at_once;
      columns(base + u * P, st, {c.i0, c.i1, 0, 1}, here * P, ahead, of_mean, of_m2);
      for (int64_t i = 0; i < here; ++i) {
        const double *m = (const double*)of_mean + i * P, *q = (const double*)of_m2 + i * P;
        double offset = 0, squares = 0, within = 0;  // from the first position's mean
        for (int64_t p = 0; p < P; ++p) {
          const double d = m[p] - m[0];
          offset += d, squares += d * d, within += q[p];
        }
        mean[u + i] = m[0] + offset * inverse;
        m2[u + i] = within + rows * (squares - offset * offset * inverse);
      }
    }
  }

  void piece(int64_t k, int64_t s, int64_t u0, int64_t u1, Vec<double>* mean, Vec<double>* m2) const {
    const Piece c = pieces.at(v, s);
    const T* base = x(k * v.n, u0);
    const int64_t units = u1 - u0;
    const int64_t ahead = next_piece(k, s, u0, u1) - (base + c.i0 * j.xs.row + c.p0 * (v.spatial ? 1 : j.xs.pos));
    if (!v.spatial) return columns(base, j.xs, c, units, ahead, mean, m2);
    if (v.P <= kFewPositions && j.xs.unit == v.P) {
      return few_positions(base, c, units, ahead, (double*)mean, (double*)m2);
    }
    for (int64_t u = 0; u < units; ++u) {
      spatial_moments<T>(base + u * j.xs.unit, j.xs.row, c, ahead, (double*)mean + u, (double*)m2 + u);
    }
  }

  // ---- the activation of a piece that the moments left in cache

  template <bool stream> void activate_run_of(int64_t i, const T* from, int64_t at, int64_t len) const {
    activate_run<T, stream>(j.activation, j.parameter, from, (T*)j.y + i * j.ds.row + at, len);
    if (j.rows) std::memcpy((T*)j.rows + i * v.U * v.P + at, from, len * sizeof(T));
  }

  template <bool stream> void activate_piece(int64_t k, int64_t s, int64_t u0, int64_t u1) const {
    const Piece c = pieces.at(v, s);
    for (int64_t i = k * v.n + c.i0; i < k * v.n + c.i1; ++i) {
      if (!v.spatial) {
        for (int64_t p = c.p0; p < c.p1; ++p) {
          activate_run_of<stream>(i, x(i, u0) + p * j.xs.pos, p * v.U + u0, u1 - u0);
        }
      } else if (j.joined) {
        activate_run_of<stream>(i, x(i, u0), u0 * v.P, (u1 - u0) * v.P);
      } else {
        for (int64_t u = u0; u < u1; ++u) activate_run_of<stream>(i, x(i, u) + c.p0, u * v.P + c.p0, c.p1 - c.p0);
      }
    }
  }

  void piece_and_activation(int64_t k, int64_t s, int64_t u0, int64_t u1, Vec<double>* mean, Vec<double>* m2) const {
    piece(k, s, u0, u1, mean, m2);
    if (!j.y) return;
    if (j.stream) activate_piece<true>(k, s, u0, u1);
    else activate_piece<false>(k, s, u0, u1);
  }

  using Wide = Vec<double>[H];  // a vector of units

  // Chan's merge over the pieces of a sub-batch, in order, from differences to the first piece's mean; returns the
  // mean, and the unbiased variance in `var`. Pieces lie `step` vectors apart.
  Vec<A> merge(const Vec<double>* mean, const Vec<double>* m2, int64_t step, Wide& var) const {
    const double M = double(v.n * v.P);
    const int64_t S = pieces.size();
    Wide all;
    for (int h = 0; h < H; ++h) {
      const Vec<double>*m = mean + h, *q = m2 + h;
      Vec<double> offset = {}, sum = {};
      for (int64_t s = 1; s < S; ++s) offset += double(pieces.at(v, s).count()) * (m[s * step] - m[0]);
      offset /= M;
      for (int64_t s = 0; s < S; ++s) {
        const Vec<double> d = (m[s * step] - m[0]) - offset;
        sum += q[s * step] + double(pieces.at(v, s).count()) * d * d;
      }
      all[h] = m[0] + offset;
      var[h] = sum * freedom;
    }
    return joined<A>(all);
  }

  // Where one piece is all of the sub-batch, and its mean final.
  VCL_IN_LOOP void variance(const Vec<double>* m2, Wide& var) const {
    for (int h = 0; h < H; ++h) var[h] = m2[h] * freedom;
  }

  // ---- loss and coefficients of a vector of units from u on, in float64: they are few

  static constexpr int64_t L8 = lanes<double>;

  void save(void* to, int64_t k, int64_t u, int64_t width, const Vec<A>& from) const {
    if (to) store_up_to<false>((A*)to + k * v.U + u, from, width);
  }

  Vec<double> beta_of(int64_t u, int64_t width) const {
    if (!j.beta) return broadcast<double>(j.beta_value);
    const A* b = (const A*)j.beta;
    if (!j.beta_step) return broadcast<double>(double(*b));
    Vec<double> wide = {};
    for (int64_t i = 0; i < L8 && i < width; ++i) wide[i] = double(b[u + i]);
    return wide;
  }

  static double sum_valid(Vec<double> a, int64_t width) {
    double sum = 0;
    for (int64_t i = 0; i < L8 && i < width; ++i) sum += a[i];
    return sum;
  }

  struct Sums {
    double loss = 0, dbeta = 0;
  };

  // var[k] becomes scale[k].
  void coefficients(int64_t u, int64_t width, Wide* var, Sums& sums) const {
    if (j.var) {
      for (int64_t k = 0; k < v.K; ++k) save(j.var, k, u, width, joined<A>(var[k]));
    }
    if (j.form == Form::none) return;
    const Vec<double> least = broadcast<double>(j.beta_min);
    Wide beta, acting, loss, dbeta;
    for (int h = 0; h < H; ++h) {
      beta[h] = beta_of(u + h * L8, width - h * L8);
      acting[h] = beta[h] < least ? least : beta[h];
    }
    form_and_derivatives<H>(j.form, j.factor * 2 / double(v.n * v.P - 1), v.K, var, acting, loss, dbeta);
    for (int h = 0; h < H; ++h) {
      loss[h] *= j.factor, dbeta[h] *= j.factor;
      if (j.beta_step) dbeta[h] = bounded_gradient(dbeta[h], beta[h], j.beta_min);  // one beta: once it is summed
      sums.loss += sum_valid(loss[h], width - h * L8);
      sums.dbeta += sum_valid(dbeta[h], width - h * L8);
    }
    save(j.loss, 0, u, width, joined<A>(loss));
    save(j.dbeta, 0, u, width, joined<A>(dbeta));
  }

  void save_sums(int64_t block, const Sums& sums) const {
    if (j.loss_sum) j.loss_sum[block] = sums.loss;
    if (j.dbeta_sum) j.dbeta_sum[block] = sums.dbeta;
  }

  // ---- gradient of units [u0, u1), while the next block comes into the cache

  // A run of values with a coefficient for each.
  template <bool stream>
  static void apply_run(const T* from, T* to, int64_t width, int64_t ahead, const Vec<A>* mean, const Vec<A>* scale) {
    for (int64_t g = 0; g * L < width; ++g) {
      unit_apply<T, stream>(from + g * L, to + g * L, clip(width - g * L), ahead, Coefficients<A>{mean[g], scale[g]});
    }
  }

  // Each unit's value P times over; writes up to a vector past the end.
  static void repeat(const A* from, int64_t units, int64_t P, A* to) {
    for (int64_t u = 0; u < units; ++u) {
      const Vec<A> value = broadcast<A>(from[u]);
      for (int64_t p = 0; p < P; p += L) store<false>(to + u * P + p, value);
    }
  }

  // `repeated`: scratch for joined runs.
  template <bool stream>
  void apply(int64_t u0, int64_t u1, const Vec<A>* mean, const Vec<A>* scale, int64_t slots, Vec<A>* repeated) const {
    const int64_t units = u1 - u0, ahead = u1 < v.U ? units * j.xs.unit : 0, run = units * v.P;
    Vec<A>* repeated_scale = repeated + vectors(run) + 1;
    for (int64_t k = 0; k < v.K; ++k) {
      const Vec<A>*m = mean + k * slots, *a = scale + k * slots;
      if (j.joined) {
        repeat((const A*)m, units, v.P, (A*)repeated);
        repeat((const A*)a, units, v.P, (A*)repeated_scale);
      }
      for (int64_t i = k * v.n; i < (k + 1) * v.n; ++i) {
        if (j.joined) {
          apply_run<stream>(x(i, u0), dx(i, u0), run, ahead, repeated, repeated_scale);
        } else if (v.spatial) {
          for (int64_t u = 0; u < units; ++u) {
            const Coefficients<A> c{broadcast<A>(((const A*)m)[u]), broadcast<A>(((const A*)a)[u])};
            spatial_apply<T, stream>(x(i, u0 + u), dx(i, u0 + u), v.P, ahead, c);
          }
        } else {
          for (int64_t p = 0; p < v.P; ++p) {
            apply_run<stream>(x(i, u0) + p * j.xs.pos, dx(i, u0) + p * j.ds.pos, units, ahead, m, a);
          }
        }
      }
    }
    for (int64_t i = v.K * v.n; i < v.N; ++i) {
      if (j.joined) {
        zero<T, stream>(dx(i, u0), run);
      } else if (v.spatial) {
        for (int64_t u = u0; u < u1; ++u) zero<T, stream>(dx(i, u), v.P);
      } else {
        for (int64_t p = 0; p < v.P; ++p) zero<T, stream>(dx(i, u0) + p * j.ds.pos, units);
      }
    }
  }

  // ---- tasks

  static void blocks(const Job& j, int64_t begin, int64_t end) {
    const Runner r(j);
    const View& v = j.view;
    const int64_t S = r.pieces.size(), most = vectors(j.block);
    const int64_t repeated = j.joined ? 2 * vectors(j.block * v.P) + 2 : 0;
    Vec<A>* mean = scratch<A>((2 * v.K + v.K * H + 2 * S * H) * most + repeated);
    Vec<A>* scale = mean + v.K * most;
    Wide* var = (Wide*)(scale + v.K * most);
    Vec<double>* pm = (Vec<double>*)(var + v.K * most);
    Vec<double>* pq = pm + S * H * most;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t u0 = b * j.block, u1 = u0 + j.block < v.U ? u0 + j.block : v.U, slots = vectors(u1 - u0);
      for (int64_t k = 0; k < v.K; ++k) {
        for (int64_t s = 0; s < S; ++s) r.piece_and_activation(k, s, u0, u1, pm + s * slots * H, pq + s * slots * H);
        for (int64_t g = 0; g < slots; ++g) {
          const Vec<double>*m = pm + g * H, *q = pq + g * H;
          Wide& to = var[g * v.K + k];
          Vec<A>& mean_of = mean[k * slots + g];
          if (S == 1) {
            mean_of = joined<A>(m);
            r.variance(q, to);
          } else {
            mean_of = r.merge(m, q, slots * H, to);
          }
        }
      }
      Sums sums;
      for (int64_t g = 0; g < slots; ++g) {
        const int64_t u = u0 + g * L, width = clip(u1 - u);
        Wide* of_unit = var + g * v.K;
        r.coefficients(u, width, of_unit, sums);
        for (int64_t k = 0; k < v.K; ++k) {
          scale[k * slots + g] = joined<A>(of_unit[k]);
          r.save(j.mean, k, u, width, mean[k * slots + g]);
          r.save(j.scale, k, u, width, scale[k * slots + g]);
        }
      }
      r.save_sums(b, sums);
      if (!j.dx) continue;
      if (j.stream) r.template apply<true>(u0, u1, mean, scale, slots, (Vec<A>*)(pq + S * H * most));
      else r.template apply<false>(u0, u1, mean, scale, slots, (Vec<A>*)(pq + S * H * most));
    }
    if (j.stream) stream_fence();
  }

  static void each_piece(const Job& j, int64_t begin, int64_t end) {
    const Runner r(j);
    const int64_t U = j.view.U, slots = vectors(U), S = r.pieces.size(), columns = (U + j.column - 1) / j.column;
    Vec<double>* final_mean = S > 1 ? nullptr : (Vec<double>*)scratch<A>(H * vectors(j.column));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t piece = t / columns, u0 = t % columns * j.column, u1 = u0 + j.column < U ? u0 + j.column : U;
      const int64_t at = H * (piece * slots + u0 / L);
      Vec<double>* mean = S > 1 ? (Vec<double>*)j.piece_mean + at : final_mean;
      r.piece_and_activation(piece / S, piece % S, u0, u1, mean, (Vec<double>*)j.piece_m2 + at);
      if (S > 1) continue;
      for (int64_t u = u0; u < u1; u += L, mean += H) r.save(j.mean, piece, u, clip(u1 - u), joined<A>(mean));
    }
    if (j.stream) stream_fence();
  }

  static void finish(const Job& j, int64_t begin, int64_t end) {
    const Runner r(j);
    const View& v = j.view;
    const int64_t S = r.pieces.size(), slots = vectors(v.U);
    Wide* var = (Wide*)scratch<A>(H * v.K);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t u0 = b * j.block, u1 = u0 + j.block < v.U ? u0 + j.block : v.U;
      Sums sums;
      for (int64_t u = u0; u < u1; u += L) {
        const int64_t width = clip(u1 - u);
        for (int64_t k = 0; k < v.K; ++k) {
          const int64_t at = H * (k * S * slots + u / L);
          const Vec<double>* m2 = (const Vec<double>*)j.piece_m2 + at;
          if (S == 1) r.variance(m2, var[k]);
          else r.save(j.mean, k, u, width, r.merge((const Vec<double>*)j.piece_mean + at, m2, H * slots, var[k]));
        }
        r.coefficients(u, width, var, sums);
        for (int64_t k = 0; k < v.K && j.scale; ++k) r.save(j.scale, k, u, width, joined<A>(var[k]));
      }
      r.save_sums(b, sums);
    }
  }

  static Kernels table() { return {&blocks, &each_piece, &finish, &Rows<T>::activations, &Rows<T>::gradients}; }
};

Kernels kernels(DType t) {
  switch (t) {
    case DType::f32: return Runner<float>::table();
    case DType::f64: return Runner<double>::table();
    case DType::bf16: return Runner<bf16>::table();
    default: return Runner<f16>::table();
  }
}

}  // namespace vcl::VCL_ISA

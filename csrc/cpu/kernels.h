// The tasks of job.h, for every dtype. Included by one file for each instruction set, which defines VCL_ISA
// as the namespace and has switched the compiler to that set.
#pragma once

namespace vcl::VCL_ISA {

#include "vec.h"
#include "forms.h"
#include "moments.h"
#include "apply.h"

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
  explicit Runner(const Job& job) : j(job), v(job.view), pieces(job.view, piece_values(job.view)) {}

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

  void piece(int64_t k, int64_t s, int64_t u0, int64_t u1, Vec<double>* mean, Vec<double>* m2) const {
    const Piece c = pieces.at(v, s);
    const T* base = x(k * v.n, u0);
    const int64_t units = u1 - u0;
    const int64_t ahead = next_piece(k, s, u0, u1) - (base + c.i0 * j.xs.row + c.p0 * (v.spatial ? 1 : j.xs.pos));
    if (v.spatial) {
      for (int64_t u = 0; u < units; ++u) {
        spatial_moments<T>(base + u * j.xs.unit, j.xs.row, c, ahead, (double*)mean + u, (double*)m2 + u);
      }
      return;
    }
    int64_t g = 0;
    for (; (g + kUnitGroup) * L <= units; g += kUnitGroup) {
      unit_moments<T, kUnitGroup>(base + g * L, j.xs, c, L, ahead, mean + g * H, m2 + g * H);
    }
    for (; g * L < units; ++g) {
      unit_moments<T, 1>(base + g * L, j.xs, c, clip(units - g * L), ahead, mean + g * H, m2 + g * H);
    }
  }

  // Chan's merge over the pieces of one sub-batch, in order, from differences to the first piece's mean.
  // `var` becomes the unbiased variance. Pieces lie `step` vectors apart.
  void merge(const Vec<double>* pm, const Vec<double>* pq, int64_t step, int64_t slots, Vec<A>* mean,
             Vec<double>* var) const {
    const double M = double(v.n * v.P), freedom = 1 / (M - 1);
    const int64_t S = pieces.size();
    for (int64_t g = 0; g < slots; ++g) {
      Vec<double> all[H];
      for (int h = 0; h < H; ++h) {
        const Vec<double>*m = pm + g * H + h, *q = pq + g * H + h;
        if (S == 1) {
          all[h] = m[0];
          var[g * H + h] = q[0] * freedom;
          continue;
        }
        Vec<double> offset = {}, m2 = {};
        for (int64_t s = 1; s < S; ++s) offset += double(pieces.at(v, s).count()) * (m[s * step] - m[0]);
        offset /= M;
        for (int64_t s = 0; s < S; ++s) {
          const Vec<double> d = (m[s * step] - m[0]) - offset;
          m2 += q[s * step] + double(pieces.at(v, s).count()) * d * d;
        }
        all[h] = m[0] + offset;
        var[g * H + h] = m2 * freedom;
      }
      mean[g] = joined<A>(all);
    }
  }

  // ---- loss and coefficients of units [u0, u1), from mean[k] and var[k], in float64: they are few

  static constexpr int64_t L8 = lanes<double>;

  void save(void* to, int64_t k, int64_t u, int64_t width, const Vec<A>& from) const {
    if (to) std::memcpy((A*)to + k * v.U + u, &from, width * sizeof(A));
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

  void coefficients(int64_t block, int64_t u0, int64_t u1, const Vec<A>* mean, Vec<double>* var, int64_t slots,
                    Vec<A>* scale) const {
    const double spread = j.factor * 2 / double(v.n * v.P - 1);
    const Vec<double> least = broadcast<double>(j.beta_min);
    double loss_sum = 0, dbeta_sum = 0;
    for (int64_t g = 0; g < slots; ++g) {
      const int64_t u = u0 + g * L, width = clip(u1 - u);
      for (int64_t k = 0; k < v.K; ++k) {
        save(j.mean, k, u, width, mean[k * slots + g]);
        if (j.var) save(j.var, k, u, width, joined<A>(var + (k * slots + g) * H));
      }
      if (j.form == Form::none) continue;
      Vec<double> loss[H], dbeta[H];
      for (int h = 0; h < H; ++h) {
        const Vec<double> beta = beta_of(u + h * L8, width - h * L8);
        loss[h] = j.factor * form_and_derivatives<double>(j.form, var + g * H + h, slots * H, v.K,
                                                          beta < least ? least : beta, &dbeta[h]);
        dbeta[h] = bounded_gradient<double>(dbeta[h] * j.factor, beta, j.beta_min);
        loss_sum += sum_valid(loss[h], width - h * L8);
        dbeta_sum += sum_valid(dbeta[h], width - h * L8);
      }
      save(j.loss, 0, u, width, joined<A>(loss));
      save(j.dbeta, 0, u, width, joined<A>(dbeta));
      for (int64_t k = 0; k < v.K; ++k) {
        Vec<double>* slope = var + (k * slots + g) * H;
        for (int h = 0; h < H; ++h) slope[h] *= spread;
        scale[k * slots + g] = joined<A>(slope);
        save(j.scale, k, u, width, scale[k * slots + g]);
      }
    }
    if (j.loss_sum) j.loss_sum[block] = loss_sum;
    if (j.dbeta_sum) j.dbeta_sum[block] = dbeta_sum;
  }

  // ---- gradient of units [u0, u1)

  template <bool stream>
  void apply(int64_t u0, int64_t u1, const Vec<A>* mean, const Vec<A>* scale, int64_t slots) const {
    const int64_t units = u1 - u0, end = v.K * v.n;
    for (int64_t k = 0; k < v.K; ++k) {
      const Vec<A>*m = mean + k * slots, *a = scale + k * slots;
      for (int64_t i = k * v.n; i < (k + 1) * v.n; ++i) {
        if (v.spatial) {
          for (int64_t u = 0; u < units; ++u) {
            const Coefficients<A> c(broadcast<A>(((const A*)m)[u]), broadcast<A>(((const A*)a)[u]));
            spatial_apply<T, stream>(x(i, u0 + u), dx(i, u0 + u), v.P, c);
          }
        } else {
          for (int64_t p = 0; p < v.P; ++p) {
            const T* from = x(i, u0) + p * j.xs.pos;
            T* to = dx(i, u0) + p * j.ds.pos;
            for (int64_t g = 0; g < slots; ++g) {
              unit_apply<T, stream>(from + g * L, to + g * L, clip(units - g * L), Coefficients<A>(m[g], a[g]));
            }
          }
        }
      }
    }
    for (int64_t i = end; i < v.N; ++i) {
      if (v.spatial) {
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
    Vec<A>* mean = scratch<A>((2 * v.K + v.K * H + 2 * S * H) * most);
    Vec<A>* scale = mean + v.K * most;
    Vec<double>* var = (Vec<double>*)(scale + v.K * most);
    Vec<double>* pm = var + v.K * H * most;
    Vec<double>* pq = pm + S * H * most;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t u0 = b * j.block, u1 = u0 + j.block < v.U ? u0 + j.block : v.U, slots = vectors(u1 - u0);
      for (int64_t k = 0; k < v.K; ++k) {
        for (int64_t s = 0; s < S; ++s) r.piece(k, s, u0, u1, pm + s * slots * H, pq + s * slots * H);
        r.merge(pm, pq, slots * H, slots, mean + k * slots, var + k * slots * H);
      }
      r.coefficients(b, u0, u1, mean, var, slots, scale);
      if (!j.dx) continue;
      if (j.stream) r.template apply<true>(u0, u1, mean, scale, slots);
      else r.template apply<false>(u0, u1, mean, scale, slots);
    }
    if (j.dx && j.stream) stream_fence();
  }

  static void each_piece(const Job& j, int64_t begin, int64_t end) {
    const Runner r(j);
    const int64_t slots = H * vectors(j.view.U), S = r.pieces.size();
    for (int64_t t = begin; t < end; ++t) {
      r.piece(t / S, t % S, 0, j.view.U, (Vec<double>*)j.piece_mean + t * slots, (Vec<double>*)j.piece_m2 + t * slots);
    }
  }

  static void finish(const Job& j, int64_t begin, int64_t end) {
    const Runner r(j);
    const View& v = j.view;
    const int64_t S = r.pieces.size(), all = vectors(v.U), most = vectors(j.block);
    Vec<A>* mean = scratch<A>((2 + H) * v.K * most);
    Vec<A>* scale = mean + v.K * most;
    Vec<double>* var = (Vec<double>*)(scale + v.K * most);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t u0 = b * j.block, u1 = u0 + j.block < v.U ? u0 + j.block : v.U, slots = vectors(u1 - u0);
      for (int64_t k = 0; k < v.K; ++k) {
        const int64_t at = H * (k * S * all + u0 / L);
        r.merge((const Vec<double>*)j.piece_mean + at, (const Vec<double>*)j.piece_m2 + at, H * all, slots,
                mean + k * slots, var + k * slots * H);
      }
      r.coefficients(b, u0, u1, mean, var, slots, scale);
    }
  }

  template <bool stream> void row(int64_t i) const {
    if (i >= v.K * v.n) return zero<T, stream>(dx(i, 0), v.U * v.P);  // a row of dx is dense
    const A* m = (const A*)j.mean + i / v.n * v.U;
    const A* a = (const A*)j.scale + i / v.n * v.U;
    const A* b = j.shift ? (const A*)j.shift + i / v.n * v.U : nullptr;
    if (v.spatial) {
      for (int64_t u = 0; u < v.U; ++u) {
        const Coefficients<A> c(broadcast<A>(m[u]), broadcast<A>(a[u]), broadcast<A>(b ? b[u] : A(0)));
        spatial_apply<T, stream>(x(i, u), dx(i, u), v.P, c);
      }
      return;
    }
    for (int64_t p = 0; p < v.P; ++p) {
      const T* from = x(i, 0) + p * j.xs.pos;
      T* to = dx(i, 0) + p * j.ds.pos;
      for (int64_t u = 0; u < v.U; u += L) {
        const int64_t width = clip(v.U - u);
        const auto get = [&](const A* c) { return width == L ? load(c + u) : load_some(c + u, width); };
        unit_apply<T, stream>(from + u, to + u, width, Coefficients<A>(get(m), get(a), b ? get(b) : Vec<A>{}));
      }
    }
  }

  static void rows(const Job& j, int64_t begin, int64_t end) {
    const Runner r(j);
    for (int64_t i = begin; i < end; ++i) {
      if (j.stream) r.template row<true>(i);
      else r.template row<false>(i);
    }
    if (j.stream) stream_fence();
  }

  static Kernels table() { return {&blocks, &each_piece, &finish, &rows}; }
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

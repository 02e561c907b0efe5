// dx of a block of units in the forward pass, from x that the moments left in cache. `ahead` is the distance to what
// will be wanted next, fetched meanwhile.
#pragma once

#include "vec.h"

namespace vcl::VCL_ISA {

// Units [u0, u1).
struct Block {
  int64_t u0, u1;
  int64_t units() const { return u1 - u0; }
};

// In this shape because a·x + b loses digits when |mean| >> std.
template <class A> inline Vec<A> dx_of(Vec<A> x, Vec<A> mean, Vec<A> scale) { return scale * (x - mean); }

// One unit's contiguous positions. With `stream`, dx and len are aligned to whole vectors.
template <class T, bool stream>
inline void spatial_dx(const T* x, T* dx, int64_t len, int64_t ahead, acc_t<T> mean, acc_t<T> scale) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  const auto at = [&](Vec<A> v) { return dx_of<A>(v, broadcast<A>(mean), broadcast<A>(scale)); };
  if (len < L) return store_some(dx, at(load_some(x, len)), len);
  int64_t q = 0;
  for (; q + L <= len; q += L) {
    __builtin_prefetch(x + q + ahead, 0, 2);
    store<stream>(dx + q, at(load(x + q)));
  }
  if (q < len) store<false>(dx + len - L, at(load(x + len - L)));
}

// A run of values with a coefficient for each.
template <class T, bool stream> inline void run_dx(const T* x, T* dx, int64_t len, int64_t ahead,
                                                   const Vec<acc_t<T>>* mean, const Vec<acc_t<T>>* scale) {
  using A = acc_t<T>;
  for (int64_t q = 0, g = 0; q < len; q += lanes<A>, ++g) {
    __builtin_prefetch(x + q + ahead, 0, 2);
    store_up_to<stream>(dx + q, dx_of<A>(load_up_to(x + q, len - q), mean[g], scale[g]), len - q);
  }
}

// Rows that take no part get a zero gradient.
template <class T, bool stream> inline void zero_run(T* dx, int64_t len) {
  constexpr int64_t L = lanes<acc_t<T>>;
  int64_t q = 0;
  if constexpr (stream) {
    for (; q + L <= len; q += L) store<true>(dx + q, Vec<acc_t<T>>{});
  }
  std::memset(dx + q, 0, (len - q) * sizeof(T));
}

// Repeats each value of `from` P times and writes elements [first, first + len) of that, up to a vector past the end.
template <class A> inline void repeat(const A* from, int64_t P, int64_t first, int64_t len, A* to) {
  for (int64_t q = 0, u = first / P, left = P - first % P; q < len; ++u, left = P) {
    const int64_t end = q + left < len ? q + left : len;
    const Vec<A> value = broadcast<A>(from[u]);
    for (int64_t c = q; c < end; c += lanes<A>) store<false>(to + c, value);
    q = end;
  }
}

// Calls f(x, at, len, u) for each run of row i in a block and positions [p0, p1): where the run lies in x, where it
// begins in a row of the output, its length, and which unit of the block is its first.
template <class T, class F>
VCL_IN_LOOP void for_runs(const ForwardJob<T>& j, Block b, int64_t i, int64_t p0, int64_t p1, F&& f) {
  const T* x = j.x + j.g.strides.offset(i, b.u0);
  if (j.plan.joined) {
    f(x, b.u0 * j.g.P, b.units() * j.g.P, 0);
  } else if (j.g.spatial) {
    for (int64_t u = b.u0; u < b.u1; ++u, x += j.g.strides.unit) f(x + p0, u * j.g.P + p0, p1 - p0, u - b.u0);
  } else {
    for (int64_t p = p0; p < p1; ++p) f(x + p * j.g.strides.pos, p * j.g.U + b.u0, b.units(), 0);
  }
}

// `room`: for a mean and a scale of each value of a joined run. `slots`: vectors from one sub-batch to the next.
template <class T, bool stream> void one_pass(const ForwardJob<T>& j, Block b, const Vec<acc_t<T>>* mean,
                                              const Vec<acc_t<T>>* scale, int64_t slots, Vec<acc_t<T>>* room) {
  using A = acc_t<T>;
  const Geometry& g = j.g;
  const int64_t ahead = b.u1 < g.U ? b.units() * g.strides.unit : 0, run = b.units() * g.P;
  Vec<A>* scale_room = room + (run + lanes<A> - 1) / lanes<A> + 1;
  for (int64_t i = 0; i < g.N; ++i) {
    T* row = j.dx + i * j.strides.row;
    if (i >= g.rows_with_loss()) {
      for_runs(j, b, i, 0, g.P,
               [&](const T*, int64_t at, int64_t len, int64_t) { zero_run<T, stream>(row + at, len); });
      continue;
    }
    const Vec<A>*m = mean + i / g.n * slots, *a = scale + i / g.n * slots;
    if (j.plan.joined) {
      if (i % g.n == 0) {
        repeat(values<A>(m), g.P, 0, run, values<A>(room));
        repeat(values<A>(a), g.P, 0, run, values<A>(scale_room));
      }
      m = room, a = scale_room;
    }
    const bool of_unit = g.spatial && !j.plan.joined;
    for_runs(j, b, i, 0, g.P, [&](const T* x, int64_t at, int64_t len, int64_t u) {
      if (of_unit) spatial_dx<T, stream>(x, row + at, len, ahead, values<A>(m)[u], values<A>(a)[u]);
      else run_dx<T, stream>(x, row + at, len, ahead, m, a);
    });
  }
}

}  // namespace vcl::VCL_ISA

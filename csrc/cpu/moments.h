// Moments of one part of a sub-batch from one read: deviations from a pivot, the part's first value, summed in float64.
// Few digits cancel, however far the mean lies from zero: the pivot is one of the values, so its squared distance to
// the mean is at most count times their variance.
#pragma once

#include "vec.h"

namespace vcl::VCL_ISA {

// `ahead`: the distance to what will be wanted next, fetched while this part is read.
template <class T>
inline void spatial_moments(const T* base, int64_t row, Part c, int64_t ahead, double* mean, double* m2) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  const int64_t len = c.p1 - c.p0, rest = len % L;
  const Vec<A> lane = lane_index<A>();
  const auto counts = len < L ? lane < A(rest) : lane >= A(L - rest);  // in the last vector, which may overlap others
  const A first = load_some(base + c.i0 * row + c.p0, 1)[0];
  const Vec<double> pivot = broadcast<double>(first);
  Vec<double> e[4] = {}, q[4] = {};
  const auto add = [&] [[gnu::always_inline]] (auto w, Vec<A> v) {
    for (int h = 0; h < wide_vectors<A>; ++h) {
      const Vec<double> d = to_wide<A>(v, h) - pivot;
      e[w] += d;
      q[w] += d * d;
    }
  };
  for (int64_t i = c.i0; i < c.i1; ++i) {
    const T* p = base + i * row + c.p0;
    int64_t at = 0;
    const auto add_at = [&] [[gnu::always_inline]] (auto w, int64_t from) {
      __builtin_prefetch(p + from + ahead, 0, 2);
      add(w, load(p + from));
    };
    const auto add_next = [&] [[gnu::always_inline]] (auto w) { add_at(w, at + w * L); };
    for (; at + 4 * L <= len; at += 4 * L) unrolled<4>(add_next);
    if (at + 2 * L <= len) unrolled<2>(add_next), at += 2 * L;
    if (at + L <= len) add_at(Index<2>(), at), at += L;
    if (at < len) add(Index<3>(), counts ? (len < L ? load_some(p, len) : load(p + len - L)) : broadcast<A>(first));
  }
  const double sum = sum_lanes<double>((e[0] + e[1]) + (e[2] + e[3])), offset = sum / double(c.count());
  *mean = first + offset;
  *m2 = sum_lanes<double>((q[0] + q[1]) + (q[2] + q[3])) - sum * offset;
}

// G vectors of units side by side; the last may hold `width` < lanes units.
template <class T, int G> inline void unit_moments(const T* base, Strides st, Part c, int64_t width, int64_t ahead,
                                                   Vec<double>* mean, Vec<double>* m2) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  constexpr int H = wide_vectors<A>;
  const double inverse = 1 / double(c.count());
  Vec<double> pivot[G * H], e[G * H], q[G * H];
  const auto get = [&](const T* at, int g) { return load_up_to(at + g * L, g + 1 < G ? L : width); };
  const T* start = base + c.i0 * st.row + c.p0 * st.pos;
  unrolled<G * H>([&](auto h) {
    pivot[h] = to_wide<A>(get(start, h / H), h % H);
    e[h] = q[h] = Vec<double>{};
  });
  for (int64_t i = c.i0; i < c.i1; ++i) {
    for (int64_t p = c.p0; p < c.p1; ++p) {
      const T* at = base + i * st.row + p * st.pos;
      unrolled<G>([&](auto g) {
        __builtin_prefetch(at + g * L + ahead, 0, 2);
        const Vec<A> v = get(at, g);
        unrolled<H>([&](auto half) {
          constexpr int h = g * H + half;
          const Vec<double> d = to_wide<A>(v, half) - pivot[h];
          e[h] += d;
          q[h] += d * d;
        });
      });
    }
  }
  unrolled<G * H>([&](auto h) {
    const Vec<double> offset = e[h] * inverse;
    mean[h] = pivot[h] + offset;
    m2[h] = q[h] - e[h] * offset;
  });
}

}  // namespace vcl::VCL_ISA

// Mean and sum of squared deviations of one piece of a sub-batch: twice over data that the first pass left in
// cache. The second pass corrects the rounding of the first mean, so that |mean| >> std costs no digits.
// Included inside the namespace of one instruction set.
#pragma once

// Visits `len` contiguous values as vectors; the tail is the last full vector with the lanes already seen
// zeroed by `mask` (or a short vector if len < lanes).
template <class T, class Each>
inline void for_vectors(const T* p, int64_t len, Each&& each) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  int64_t q = 0;
  for (; q + 4 * L <= len; q += 4 * L) {
    each(0, load(p + q), true, 0);
    each(1, load(p + q + L), true, 0);
    each(2, load(p + q + 2 * L), true, 0);
    each(3, load(p + q + 3 * L), true, 0);
  }
  for (int w = 0; q + L <= len; q += L, ++w) each(w, load(p + q), true, 0);
  if (q < len) {
    if (len >= L) each(3, load(p + len - L), false, L - (len - q));
    else each(3, load_some(p, len), false, -len);
  }
}

// Lanes [from, L) if from >= 0, lanes [0, -from) otherwise; other lanes zero.
template <class A> inline Vec<A> only(Vec<A> v, int64_t from) {
  const Vec<A> lane = lane_index<A>();
  return from >= 0 ? (lane >= A(from) ? v : Vec<A>{}) : (lane < A(-from) ? v : Vec<A>{});
}

template <class T>
inline void spatial_moments(const T* base, int64_t row, Piece c, acc_t<T>* mean, acc_t<T>* m2) {
  using A = acc_t<T>;
  const int64_t len = c.p1 - c.p0;
  const A count = A(c.count());
  Vec<A> s[4] = {}, e[4] = {}, q[4] = {};
  for (int64_t i = c.i0; i < c.i1; ++i) {
    for_vectors(base + i * row + c.p0, len, [&](int w, Vec<A> v, bool whole, int64_t from) {
      s[w] += whole ? v : only<A>(v, from);
    });
  }
  const A m = sum_lanes<A>((s[0] + s[1]) + (s[2] + s[3])) / count;
  const Vec<A> vm = broadcast<A>(m);
  for (int64_t i = c.i0; i < c.i1; ++i) {
    for_vectors(base + i * row + c.p0, len, [&](int w, Vec<A> v, bool whole, int64_t from) {
      const Vec<A> d = whole ? v - vm : only<A>(v - vm, from);
      e[w] += d;
      q[w] += d * d;
    });
  }
  const A error = sum_lanes<A>((e[0] + e[1]) + (e[2] + e[3]));
  *mean = m + error / count;
  *m2 = sum_lanes<A>((q[0] + q[1]) + (q[2] + q[3])) - error * error / count;
}

// G vectors of units side by side; the last may hold `width` < lanes units.
template <class T, int G>
inline void unit_moments(const T* base, Strides st, Piece c, int64_t width, Vec<acc_t<T>>* mean, Vec<acc_t<T>>* m2) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  const A count = A(c.count());
  Vec<A> m[G] = {}, e[G] = {}, q[G] = {};
  const auto each_row = [&](auto&& body) {
    for (int64_t i = c.i0; i < c.i1; ++i) {
      for (int64_t p = c.p0; p < c.p1; ++p) {
        const T* at = base + i * st.row + p * st.pos;
        for (int g = 0; g < G; ++g) body(g, width == L || g + 1 < G ? load(at + g * L) : load_some(at + g * L, width));
      }
    }
  };
  each_row([&](int g, Vec<A> v) { m[g] += v; });
  for (int g = 0; g < G; ++g) m[g] /= count;
  each_row([&](int g, Vec<A> v) {
    const Vec<A> d = v - m[g];
    e[g] += d;
    q[g] += d * d;
  });
  for (int g = 0; g < G; ++g) {
    mean[g] = m[g] + e[g] / count;
    m2[g] = q[g] - e[g] * e[g] / count;
  }
}

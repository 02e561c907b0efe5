// Mean and sum of squared deviations of one piece of a sub-batch: twice over data that the first pass left in
// cache. The second pass corrects the rounding of the first mean, so that |mean| >> std costs no digits. Where a
// unit's values go to many lanes these sum in the accumulation type, and in float64 from there on.
// Included inside the namespace of one instruction set.
#pragma once

// Visits `len` contiguous values as vectors, the first argument (a constant) naming one of four accumulators.
// The tail is the last full vector with the lanes already seen zeroed, or a short vector if len < lanes.
template <class A> struct Tail {
  int64_t rest;
  Vec<A> keep;  // all bits set in the lanes that count
  explicit Tail(int64_t len) : rest(len % lanes<A>), keep{} {
    const Vec<A> lane = lane_index<A>();
    keep = std::bit_cast<Vec<A>>(len < lanes<A> ? lane < A(rest) : lane >= A(lanes<A> - rest));
  }
  Vec<A> operator()(Vec<A> v) const {
    typedef int32_t bits_t __attribute__((vector_size(64)));
    return std::bit_cast<Vec<A>>(std::bit_cast<bits_t>(v) & std::bit_cast<bits_t>(keep));
  }
};

template <int w> using Index = std::integral_constant<int, w>;

template <class T, class Full, class Last>
inline void for_vectors(const T* p, int64_t len, Full&& full, Last&& last) {
  constexpr int64_t L = lanes<acc_t<T>>;
  int64_t q = 0;
  for (; q + 4 * L <= len; q += 4 * L) {
    full(Index<0>(), p + q);
    full(Index<1>(), p + q + L);
    full(Index<2>(), p + q + 2 * L);
    full(Index<3>(), p + q + 3 * L);
  }
  if (q + 2 * L <= len) {
    full(Index<0>(), p + q);
    full(Index<1>(), p + q + L);
    q += 2 * L;
  }
  if (q + L <= len) {
    full(Index<2>(), p + q);
    q += L;
  }
  if (q < len) last(len < L ? load_some(p, len) : load(p + len - L));
}

// `ahead`: the distance to what will be wanted next, fetched while this piece is read for the second time.
template <class T>
inline void spatial_moments(const T* base, int64_t row, Piece c, int64_t ahead, double* mean, double* m2) {
  using A = acc_t<T>;
  const int64_t len = c.p1 - c.p0;
  const A inverse = A(1) / A(c.count());
  const Tail<A> tail(len);
  Vec<A> s[4] = {}, e[4] = {}, q[4] = {};
  for (int64_t i = c.i0; i < c.i1; ++i) {
    for_vectors(base + i * row + c.p0, len, [&](auto w, const T* p) { s[w] += load(p); },
                [&](Vec<A> v) { s[3] += tail(v); });
  }
  const A m = sum_lanes<A>((s[0] + s[1]) + (s[2] + s[3])) * inverse;
  const Vec<A> vm = broadcast<A>(m);
  for (int64_t i = c.i0; i < c.i1; ++i) {
    const auto add = [&](auto w, Vec<A> d) {
      e[w] += d;
      q[w] += d * d;
    };
    for_vectors(base + i * row + c.p0, len,
                [&](auto w, const T* p) {
                  __builtin_prefetch(p + ahead, 0, 2);
                  add(w, load(p) - vm);
                },
                [&](Vec<A> v) { add(Index<3>(), tail(v - vm)); });
  }
  const double error = sum_lanes_wide<A>((e[0] + e[1]) + (e[2] + e[3])), count = double(c.count());
  *mean = m + error / count;
  *m2 = sum_lanes_wide<A>((q[0] + q[1]) + (q[2] + q[3])) - error * error / count;
}

// G vectors of units side by side; the last may hold `width` < lanes units. Few values may go to one lane, so
// that no errors average out: deviations are summed in float64.
template <class T, int G>
inline void unit_moments(const T* base, Strides st, Piece c, int64_t width, int64_t ahead, Vec<double>* mean,
                         Vec<double>* m2) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  constexpr int H = parts<A>;
  const double inverse = 1 / double(c.count());
  Vec<A> s[G] = {};
  Vec<double> m[G * H], e[G * H] = {}, q[G * H] = {};
  const auto each_row = [&](auto&& body) {
    for (int64_t i = c.i0; i < c.i1; ++i) {
      for (int64_t p = c.p0; p < c.p1; ++p) {
        const T* at = base + i * st.row + p * st.pos;
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) body(g, at + g * L, width == L || g + 1 < G ? load(at + g * L) : load_some(at + g * L, width));
      }
    }
  };
  each_row([&](int g, const T*, Vec<A> v) { s[g] += v; });
  for (int h = 0; h < G * H; ++h) m[h] = part<A>(s[h / H], h % H) * inverse;
  each_row([&](int g, const T* at, Vec<A> v) {
    __builtin_prefetch(at + ahead, 0, 2);
#pragma GCC unroll 8
    for (int h = g * H; h < (g + 1) * H; ++h) {
      const Vec<double> d = part<A>(v, h - g * H) - m[h];
      e[h] += d;
      q[h] += d * d;
    }
  });
  for (int h = 0; h < G * H; ++h) {
    mean[h] = m[h] + e[h] * inverse;
    m2[h] = q[h] - e[h] * e[h] * inverse;
  }
}

// Mean and sum of squared deviations of one piece of a sub-batch, from one read: of deviations from the piece's first
// value or values, so that no digits to speak of cancel, however far the mean lies from zero.
// Included inside the namespace of one instruction set.
#pragma once

template <int w> using Index = std::integral_constant<int, w>;

// Visits `len` contiguous values: whole vectors, their first argument (a constant) naming one of four accumulators;
// and at the end what is left over, in the last full vector of the run or in a short one.
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

// Sums of deviations and of their squares, in S: A or float64. Where S is float32, float64 takes over after at most
// 2 * kGroup values: the few roundings until then average out over the lanes.
template <class A, class S> struct Deviations {
  static constexpr int halves = sizeof(S) / sizeof(A);
  const Vec<A> near;
  Vec<S> e[4] = {}, q[4] = {};
  Vec<double> sum = {}, squares = {};

  template <int w> void add(Index<w>, Vec<A> v) {
    for (int h = 0; h < halves; ++h) {
      Vec<S> d;
      if constexpr (halves == 1) d = v - near;
      else d = part<A>(v, h) - part<A>(near, h);
      e[w] += d;
      q[w] += d * d;
    }
  }

  void widen() {
    const Vec<S> deviations = (e[0] + e[1]) + (e[2] + e[3]), even = q[0] + q[2], odd = q[1] + q[3];
    for (int h = 0; h < parts<S>; ++h) {
      sum += part<S>(deviations, h);
      squares += part<S>(even, h) + part<S>(odd, h);
    }
    for (int w = 0; w < 4; ++w) e[w] = q[w] = Vec<S>{};
  }
};

constexpr int64_t kGroup = 512, kFew = 192;  // values

// `ahead`: the distance to what will be wanted next, fetched while this piece is read.
template <class T, class S>
inline void spatial_moments_in(const T* base, int64_t row, Piece c, int64_t ahead, double* mean, double* m2) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  const int64_t len = c.p1 - c.p0, rest = len % L, few = len < L ? len : L;
  const Vec<A> lane = lane_index<A>();
  const auto counts = len < L ? lane < A(rest) : lane >= A(L - rest);
  // A value of T, so that deviations of half precision are exact, and their squares nearly.
  const A near = widen(narrow<T>(sum_lanes<A>(load_up_to(base + c.i0 * row + c.p0, few) / A(few))));
  Deviations<A, S> found{broadcast<A>(near)};
  for (int64_t i = c.i0, pending = 0; i < c.i1; ++i) {
    for (int64_t p = c.p0, take; p < c.p1; p += take) {
      take = c.p1 - p < 2 * kGroup ? c.p1 - p : kGroup;
      if (pending + take > kGroup) found.widen(), pending = 0;
      pending += take;
      for_vectors(base + i * row + p, take,
                  [&](auto w, const T* at) {
                    __builtin_prefetch(at + ahead, 0, 2);
                    found.add(w, load(at));
                  },
                  [&](Vec<A> v) { found.add(Index<3>(), counts ? v : found.near); });
    }
  }
  found.widen();
  const double sum = sum_lanes<double>(found.sum), offset = sum / double(c.count());
  *mean = near + offset;
  *m2 = sum_lanes<double>(found.squares) - sum * offset;
}

template <class T>
inline void spatial_moments(const T* base, int64_t row, Piece c, int64_t ahead, double* mean, double* m2) {
  if (c.count() <= kFew) spatial_moments_in<T, double>(base, row, c, ahead, mean, m2);
  else spatial_moments_in<T, acc_t<T>>(base, row, c, ahead, mean, m2);
}

// f of the constants 0 … count - 1: arrays that are indexed so stay in registers.
template <int count, class F> inline void unrolled(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (f(Index<i>()), ...); }(std::make_integer_sequence<int, count>());
}

// G vectors of units side by side; the last may hold `width` < lanes units.
template <class T, int G>
inline void unit_moments(const T* base, Strides st, Piece c, int64_t width, int64_t ahead, Vec<double>* mean,
                         Vec<double>* m2) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  constexpr int H = parts<A>;
  const double inverse = 1 / double(c.count());
  Vec<double> first[G * H], e[G * H], q[G * H];
  const auto get = [&](const T* at, int g) {
    return load_up_to(at + g * L, g + 1 < G ? L : width);
  };
  const T* start = base + c.i0 * st.row + c.p0 * st.pos;
  unrolled<G * H>([&](auto h) {
    first[h] = part<A>(get(start, h / H), h % H);
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
          const Vec<double> d = part<A>(v, half) - first[h];
          e[h] += d;
          q[h] += d * d;
        });
      });
    }
  }
  unrolled<G * H>([&](auto h) {
    const Vec<double> offset = e[h] * inverse;
    mean[h] = first[h] + offset;
    m2[h] = q[h] - e[h] * offset;
  });
}

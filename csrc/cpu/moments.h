// Mean and sum of squared deviations of one piece of a sub-batch, from one read: deviations from the piece's first
// value, summed in float64. That value being one of them, its square is at most count times their variance, so that no
// digits to speak of cancel, however far the mean lies from zero.
// Included inside the namespace of one instruction set.
#pragma once

template <int w> using Index = std::integral_constant<int, w>;

// Visits `len` contiguous values: whole vectors, their first argument (a constant) naming one of four accumulators;
// and at the end what is left over, in the last full vector of the run or in a short one.
template <class T, class Full, class Last>
VCL_IN_LOOP void for_vectors(const T* p, int64_t len, Full&& full, Last&& last) {
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

// `ahead`: the distance to what will be wanted next, fetched while this piece is read.
template <class T>
inline void spatial_moments(const T* base, int64_t row, Piece c, int64_t ahead, double* mean, double* m2) {
  using A = acc_t<T>;
  const int64_t len = c.p1 - c.p0, rest = len % lanes<A>;
  const Vec<A> lane = lane_index<A>();
  const auto counts = len < lanes<A> ? lane < A(rest) : lane >= A(lanes<A> - rest);
  const A first = widen(base[c.i0 * row + c.p0]);
  const Vec<double> shift = broadcast<double>(first);
  Vec<double> e[4] = {}, q[4] = {};
  const auto add = [&] [[gnu::always_inline]] (auto w, Vec<A> v) {
    for (int h = 0; h < parts<A>; ++h) {
      const Vec<double> d = part<A>(v, h) - shift;
      e[w] += d;
      q[w] += d * d;
    }
  };
  for (int64_t i = c.i0; i < c.i1; ++i) {
    for_vectors(base + i * row + c.p0, len,
                [&] [[gnu::always_inline]] (auto w, const T* p) {
                  __builtin_prefetch(p + ahead, 0, 2);
                  add(w, load(p));
                },
                [&] [[gnu::always_inline]] (Vec<A> v) { add(Index<3>(), counts ? v : broadcast<A>(first)); });
  }
  const double sum = sum_lanes<double>((e[0] + e[1]) + (e[2] + e[3])), offset = sum / double(c.count());
  *mean = first + offset;
  *m2 = sum_lanes<double>((q[0] + q[1]) + (q[2] + q[3])) - sum * offset;
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

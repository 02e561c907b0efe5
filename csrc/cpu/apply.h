// dx = scale * (x - mean), in this shape because a*x + b loses digits when |mean| >> std.
// `ahead` is the distance to what will be wanted next, fetched meanwhile.
// Included inside the namespace of one instruction set.
#pragma once

template <class A> struct Coefficients {
  Vec<A> mean, scale;
};

template <class A> inline Vec<A> gradient(Vec<A> x, const Coefficients<A>& c) {
  return c.scale * (x - c.mean);
}

// One unit's contiguous positions. With `stream`, dx and len are aligned to whole vectors.
template <class T, bool stream>
inline void spatial_apply(const T* x, T* dx, int64_t len, int64_t ahead, const Coefficients<acc_t<T>>& c) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  if (len < L) return store_some(dx, gradient<A>(load_some(x, len), c), len);
  int64_t q = 0;
  for (; q + L <= len; q += L) {
    __builtin_prefetch(x + q + ahead, 0, 2);
    store<stream>(dx + q, gradient<A>(load(x + q), c));
  }
  if (q < len) store<false>(dx + len - L, gradient<A>(load(x + len - L), c));
}

// One vector of units, `width` of them valid.
template <class T, bool stream>
inline void unit_apply(const T* x, T* dx, int64_t width, int64_t ahead, const Coefficients<acc_t<T>>& c) {
  using A = acc_t<T>;
  __builtin_prefetch(x + ahead, 0, 2);
  store_up_to<stream>(dx, gradient<A>(load_up_to(x, width), c), width);
}

// Rows that take no part get a zero gradient.
template <class T, bool stream> inline void zero(T* dx, int64_t len) {
  constexpr int64_t L = lanes<acc_t<T>>;
  int64_t q = 0;
  if constexpr (stream) {
    for (; q + L <= len; q += L) store<true>(dx + q, Vec<acc_t<T>>{});
  }
  std::memset(dx + q, 0, (len - q) * sizeof(T));
}

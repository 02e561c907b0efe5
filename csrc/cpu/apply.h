// dx = scale * (x - mean) + shift, in this shape because a*x + b loses digits when |mean| >> std.
// Included inside the namespace of one instruction set.
#pragma once

template <class A> struct Coefficients {
  Vec<A> mean, scale, shift;
  Coefficients(Vec<A> m, Vec<A> a, Vec<A> b = Vec<A>{}) : mean(m), scale(a), shift(b) {}
};

template <class A> inline Vec<A> gradient(Vec<A> x, const Coefficients<A>& c) {
  return c.scale * (x - c.mean) + c.shift;
}

// One unit's contiguous positions. With `stream`, dx and len are aligned to whole vectors.
template <class T, bool stream>
inline void spatial_apply(const T* x, T* dx, int64_t len, const Coefficients<acc_t<T>>& c) {
  using A = acc_t<T>;
  constexpr int64_t L = lanes<A>;
  if (len < L) return store_some(dx, gradient<A>(load_some(x, len), c), len);
  int64_t q = 0;
  for (; q + L <= len; q += L) store<stream>(dx + q, gradient<A>(load(x + q), c));
  if (q < len) store<false>(dx + len - L, gradient<A>(load(x + len - L), c));
}

// One vector of units, `width` of them valid.
template <class T, bool stream>
inline void unit_apply(const T* x, T* dx, int64_t width, const Coefficients<acc_t<T>>& c) {
  using A = acc_t<T>;
  if (width == lanes<A>) store<stream>(dx, gradient<A>(load(x), c));
  else store_some(dx, gradient<A>(load_some(x, width), c), width);
}

// Rows that take no part get a zero gradient.
template <class T, bool stream> inline void zero(T* dx, int64_t len) {
  if constexpr (stream) {
    for (int64_t q = 0; q < len; q += lanes<acc_t<T>>) store<true>(dx + q, Vec<acc_t<T>>{});
  } else {
    std::memset(dx, 0, len * sizeof(T));
  }
}

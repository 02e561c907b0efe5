// exp, expm1, erf and tanh of a vector: glibc's vector math library where the build found it (at most 4 ulp), else
// the C++ library lane by lane. Included inside the namespace of one instruction set.
#pragma once

#if defined(VCL_MVEC) && VCL_LEVEL == 2
#define VCL_VECTOR_MATH(name)                                                                        \
  inline Vec<float> name(Vec<float> v) {                                                             \
    return std::bit_cast<Vec<float>>(_ZGVeN16v_##name##f(std::bit_cast<__m512>(v)));                 \
  }                                                                                                  \
  inline Vec<double> name(Vec<double> v) {                                                           \
    return std::bit_cast<Vec<double>>(_ZGVeN8v_##name(std::bit_cast<__m512d>(v)));                   \
  }
#elif defined(VCL_MVEC) && VCL_LEVEL == 1
template <class Half, class A, class F> inline Vec<A> by_halves(Vec<A> v, F f) {
  Half half[2];
  std::memcpy(half, &v, sizeof v);
  half[0] = f(half[0]), half[1] = f(half[1]);
  std::memcpy(&v, half, sizeof v);
  return v;
}
#define VCL_VECTOR_MATH(name)                                                                        \
  inline Vec<float> name(Vec<float> v) {                                                             \
    return by_halves<__m256, float>(v, [](__m256 h) { return _ZGVdN8v_##name##f(h); });              \
  }                                                                                                  \
  inline Vec<double> name(Vec<double> v) {                                                           \
    return by_halves<__m256d, double>(v, [](__m256d h) { return _ZGVdN4v_##name(h); });              \
  }
#else
#define VCL_VECTOR_MATH(name)                                                                        \
  template <class V> inline V name(V v) {                                                            \
    for (size_t i = 0; i < sizeof v / sizeof v[0]; ++i) v[i] = std::name(v[i]);                      \
    return v;                                                                                        \
  }
#endif

VCL_VECTOR_MATH(exp)
VCL_VECTOR_MATH(expm1)
VCL_VECTOR_MATH(erf)
VCL_VECTOR_MATH(tanh)

#undef VCL_VECTOR_MATH

inline Vec<float> reciprocal(Vec<float> v) {
#if VCL_LEVEL >= 2  // 14 bits, doubled by a step of Newton's: a division of 16 values takes as long as all else here
  const Vec<float> near = std::bit_cast<Vec<float>>(_mm512_rcp14_ps(std::bit_cast<__m512>(v)));
  return near * (2.0f - v * near);
#else
  return 1.0f / v;
#endif
}

// Exponentials, erf and tanh of a vector. Of float64 they come from glibc's vector math library where the build found it
// (at most 4 ulp), else from the C++ library lane by lane. Of float32 exp, expm1 of what is not positive, and tanh are
// written out, so that neighbouring vectors overlap. Included inside the namespace of one instruction set.
#pragma once

#if defined(VCL_MVEC) && VCL_LEVEL == 2
#define VCL_VECTOR_MATH(name)                                                                        \
  inline Vec<double> name(Vec<double> v) {                                                           \
    return std::bit_cast<Vec<double>>(_ZGVeN8v_##name(std::bit_cast<__m512d>(v)));                   \
  }
#elif defined(VCL_MVEC) && VCL_LEVEL == 1
#define VCL_VECTOR_MATH(name)                                                                        \
  inline Vec<double> name(Vec<double> v) {                                                           \
    __m256d half[2];                                                                                 \
    std::memcpy(half, &v, sizeof v);                                                                 \
    half[0] = _ZGVdN4v_##name(half[0]), half[1] = _ZGVdN4v_##name(half[1]);                          \
    std::memcpy(&v, half, sizeof v);                                                                 \
    return v;                                                                                        \
  }
#else
#define VCL_VECTOR_MATH(name)                                                                        \
  inline Vec<double> name(Vec<double> v) {                                                           \
    for (size_t i = 0; i < sizeof v / sizeof v[0]; ++i) v[i] = std::name(v[i]);                      \
    return v;                                                                                        \
  }
#endif

VCL_VECTOR_MATH(exp)
VCL_VECTOR_MATH(expm1)
VCL_VECTOR_MATH(erf)
VCL_VECTOR_MATH(tanh)

#undef VCL_VECTOR_MATH

// Also keeps a libm call from its slow path where the result is not used or is at its limit already.
template <class A> inline Vec<A> clamped(Vec<A> v, A low, A high) {  // NaN stays NaN
  v = v < low ? broadcast<A>(low) : v;
  return v > high ? broadcast<A>(high) : v;
}

// Σ c_j v^j, the highest power's coefficient first.
template <size_t N> VCL_IN_LOOP Vec<float> polynomial(const float (&from_highest)[N], Vec<float> v) {
  Vec<float> sum = broadcast<float>(from_highest[0]);
  for (size_t j = 1; j < N; ++j) sum = sum * v + from_highest[j];
  return sum;
}

// x = k ln 2 + r, |r| <= ln 2 / 2, of x in [-87, 89]; `power` is k in the place of a float's exponent, to be added to
// the bits of a value.
struct Reduced {
  Vec<float> r;
  u32x16 power;
};
VCL_IN_LOOP Reduced reduced(Vec<float> x) {
  constexpr float round = 0x1.8p23f;  // added, it leaves an integer in the lowest bits
  const Vec<float> shifted = x * 1.44269504f + round, k = shifted - round;
  return {(x - k * 0.693145752f) - k * 1.42860677e-6f,  // ln 2 in two parts, the first times k exact
          std::bit_cast<u32x16>(shifted) << 23};
}

VCL_IN_LOOP Vec<float> times_power(Vec<float> v, u32x16 power) {
  return std::bit_cast<Vec<float>>(std::bit_cast<u32x16>(v) + power);
}

VCL_IN_LOOP Vec<float> expm1_of_reduced(Vec<float> r) {
  // (expm1(r) - r) / r², fitted to least greatest relative error of expm1(r), 1.3e-8
  constexpr float from_highest[] = {0.00138825167f, 0.00836654752f, 0.0416672006f, 0.166665435f, 0.49999997f};
  return r + r * r * polynomial(from_highest, r);
}

// Below -87 it is e^-87.
VCL_IN_LOOP Vec<float> exp(Vec<float> x) {
  const Reduced of = reduced(x < -87.0f ? broadcast<float>(-87) : x);
  const Vec<float> found = times_power(1.0f + expm1_of_reduced(of.r), of.power);
  return x < 88.7228394f ? found : x * std::numeric_limits<float>::infinity();  // NaN, of whatever bits, stays NaN
}

template <class A> constexpr A kFlat = A(sizeof(A) == 4 ? -20 : -40);  // where expm1 has become -1

// exp(x) - 1 of x in [-87, 0]: 2^k (expm1(r) + 1), and 1 taken off where it is exact.
inline Vec<double> expm1_below_0(Vec<double> x) { return expm1(x); }
VCL_IN_LOOP Vec<float> expm1_below_0(Vec<float> x) {
  const Reduced of = reduced(x);
  const Vec<float> scale = times_power(broadcast<float>(1), of.power);
  return scale * expm1_of_reduced(of.r) + (scale - 1.0f);
}

// A division of 16 values takes as long as a polynomial. AVX-512 begins with 14 bits of the reciprocal, and a step of
// Newton's doubles them: for divisors, and results, far from the ends of the range.
#if VCL_LEVEL >= 2
inline Vec<float> near_reciprocal(Vec<float> v) {
  return std::bit_cast<Vec<float>>(_mm512_rcp14_ps(std::bit_cast<__m512>(v)));
}
VCL_IN_LOOP Vec<float> reciprocal(Vec<float> v) {
  const Vec<float> near = near_reciprocal(v);
  return near * (2.0f - v * near);
}
VCL_IN_LOOP Vec<float> quotient(Vec<float> a, Vec<float> b) {
  const Vec<float> inverse = near_reciprocal(b), near = a * inverse;
  return near + (a - near * b) * inverse;
}
#else
inline Vec<float> reciprocal(Vec<float> v) { return 1.0f / v; }
inline Vec<float> quotient(Vec<float> a, Vec<float> b) { return a / b; }
#endif

// -m / (2 + m) with the sign of x, m = expm1(-2|x|).
VCL_IN_LOOP Vec<float> tanh(Vec<float> x) {
  const Vec<float> m = expm1_below_0(clamped<float>(x < 0.0f ? 2.0f * x : -2.0f * x, kFlat<float>, 0));
  const Vec<float> y = quotient(m, 2.0f + m);
  return std::bit_cast<Vec<float>>((std::bit_cast<u32x16>(y) & 0x7fffffff) | (std::bit_cast<u32x16>(x) & 0x80000000));
}

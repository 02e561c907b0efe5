// Activation functions and their derivatives, written out so that neighbouring vectors overlap.
#pragma once

#include "vec.h"

namespace vcl::VCL_ISA {

template <class A> inline Vec<A> clamped(Vec<A> v, A low, A high) {  // NaN stays NaN
  v = v < low ? broadcast<A>(low) : v;
  return v > high ? broadcast<A>(high) : v;
}

// Σ c_j v^j, the highest power's coefficient first.
template <class A, size_t N> VCL_IN_LOOP Vec<A> polynomial(const A (&from_highest)[N], Vec<A> v) {
  Vec<A> sum = broadcast<A>(from_highest[0]);
  for (size_t j = 1; j < N; ++j) sum = sum * v + from_highest[j];
  return sum;
}

// Of exp: finite up to `highest`, and below `lowest` taken as e^lowest. From `flat` down expm1 is -1.
template <class A> struct Exp;
template <> struct Exp<float> {
  using Bits = u32x16;
  static constexpr int mantissa = 23;
  static constexpr float lowest = -87.0f, highest = 88.7228394f, flat = -20;
  static constexpr float ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
  // (expm1(r) - r) / r², fitted to least greatest relative error of expm1(r), 1.3e-8
  static constexpr float from_highest[] = {0.00138825167f, 0.00836654752f, 0.0416672006f, 0.166665435f, 0.49999997f};
};
template <> struct Exp<double> {
  using Bits = Vec<uint64_t>;
  static constexpr int mantissa = 52;
  static constexpr double lowest = -708, highest = 709.782712893384, flat = -40;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  // the same, of Taylor's series: 1 / 13! … 1 / 2!
  static constexpr double from_highest[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0,
                                            1 / 362880.0,     1 / 40320.0,     1 / 5040.0,     1 / 720.0,
                                            1 / 120.0,        1 / 24.0,        1 / 6.0,        1 / 2.0};
};

// x = k ln 2 + r, |r| <= ln 2 / 2, of x in [lowest, highest]; `power` is k in the place of the exponent, to be added to
// the bits of a value.
template <class A> struct Reduced {
  Vec<A> r;
  typename Exp<A>::Bits power;
};
template <class A> VCL_IN_LOOP Reduced<A> reduced(Vec<A> x) {
  constexpr A round = A(1.5) * A(uint64_t(1) << Exp<A>::mantissa);  // added, it leaves an integer in the lowest bits
  const Vec<A> shifted = x * A(1.44269504088896340736) + round, k = shifted - round;
  return {(x - k * Exp<A>::ln2_high) - k * Exp<A>::ln2_low,  // ln 2 in two parts, the first times k exact
          std::bit_cast<typename Exp<A>::Bits>(shifted) << Exp<A>::mantissa};
}

template <class A> VCL_IN_LOOP Vec<A> times_power(Vec<A> v, typename Exp<A>::Bits power) {
  return std::bit_cast<Vec<A>>(std::bit_cast<typename Exp<A>::Bits>(v) + power);
}

template <class A> VCL_IN_LOOP Vec<A> expm1_of_reduced(Vec<A> r) {
  return r + r * r * polynomial(Exp<A>::from_highest, r);
}

template <class A> VCL_IN_LOOP Vec<A> exp(Vec<A> x) {
  const Reduced<A> of = reduced<A>(x < Exp<A>::lowest ? broadcast<A>(Exp<A>::lowest) : x);
  const Vec<A> found = times_power<A>(A(1) + expm1_of_reduced<A>(of.r), of.power);
  return x < Exp<A>::highest ? found : x * std::numeric_limits<A>::infinity();  // NaN, of whatever bits, stays NaN
}

// exp(x) - 1 of x in [lowest, 0]: 2^k (expm1(r) + 1), and 1 taken off where it is exact.
template <class A> VCL_IN_LOOP Vec<A> expm1_below_0(Vec<A> x) {
  const Reduced<A> of = reduced<A>(x);
  const Vec<A> scale = times_power<A>(broadcast<A>(1), of.power);
  return scale * expm1_of_reduced<A>(of.r) + (scale - A(1));
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
inline Vec<double> quotient(Vec<double> a, Vec<double> b) { return a / b; }

// -m / (2 + m) with the sign of x, m = expm1(-2|x|).
template <class A> VCL_IN_LOOP Vec<A> tanh(Vec<A> x) {
  using Bits = typename Exp<A>::Bits;
  constexpr auto sign = std::bit_cast<std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>>(A(-0.0));
  const Vec<A> m = expm1_below_0<A>(clamped<A>(x < A(0) ? A(2) * x : A(-2) * x, Exp<A>::flat, 0));
  const Vec<A> y = quotient(m, A(2) + m);
  return std::bit_cast<Vec<A>>((std::bit_cast<Bits>(y) & ~sign) | (std::bit_cast<Bits>(x) & sign));
}

// ---- activations

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kDensityAt0 = 0.39894228040143267794;  // of the standard normal, 1 / sqrt(2 pi)
// gelu's approximation: x / 2 · (1 + tanh(a / 2)) = x · sigmoid(a), a = slope · (x + cubic · x³)
constexpr double kGeluSlope = 2 * 0.79788456080286535588;  // 2 sqrt(2 / pi)
constexpr double kGeluCubic = 0.044715;

// Keeps a load apart from the choice of its lanes: a load under a mask that is still being computed halves the speed.
template <class V> inline V in_register(V v) {
#if VCL_LEVEL >= 2
  asm("" : "+v"(v));
#endif
  return v;
}

// exp(-x² / 2). In float32 less exact than exp, and shorter.
inline Vec<double> gauss(Vec<double> x) { return exp<double>(-0.5 * x * x); }
VCL_IN_LOOP Vec<float> gauss(Vec<float> x) {
  const Vec<float> at = -0.5f * x * x;
  const Reduced<float> of = reduced<float>(at);
  // exp(r), fitted to least greatest relative error, 8e-8
  constexpr float from_highest[] = {0.00829764970f, 0.0419154199f, 0.166675750f,
                                    0.499988945f,   0.999999692f,  1.00000007f};
  return at < -87.0f ? Vec<float>{} : times_power<float>(polynomial(from_highest, of.r), of.power);
}

// exp(a²) erfc(a) of a >= 0 to 3e-7 of itself, or 1e-6 where a result of 16 bits is made of it (`coarse`): t times a
// polynomial in t = 1 / (1 + a / 2), fitted to least greatest relative error on [0, 9.5]. Beside gauss, which the
// density needs as well, it is much less work than erf.
template <bool coarse> VCL_IN_LOOP Vec<float> scaled_erfc(Vec<float> a) {
  constexpr float fine[] = {0.0138569782f, -0.131642446f, 0.44823283f,  -0.695125997f, 0.441543728f,
                            -0.108824871f, 0.229028299f,  0.237932801f, 0.282938063f,  0.282060593f};
  constexpr float short_one[] = {0.0891232617f, -0.359978232f, 0.393768431f, 0.0346663886f,
                                 0.282716721f,  0.277354203f,  0.282348044f};
  const Vec<float> t = reciprocal(1.0f + 0.5f * a);
  return (coarse ? polynomial(short_one, t) : polynomial(fine, t)) * t;
}

// The standard normal's distribution function, given gauss(x).
template <bool coarse> VCL_IN_LOOP Vec<float> normal_cdf(Vec<float> x, Vec<float> gauss_x) {
  const Vec<float> a = (x < 0.0f ? -x : x) * float(kSqrtHalf);
  const Vec<float> tail = 0.5f * gauss_x * scaled_erfc<coarse>(a > 10.0f ? broadcast<float>(10) : a);
  return x < 0.0f ? tail : 1.0f - tail;
}
template <bool> inline Vec<double> normal_cdf(Vec<double> x, Vec<double>) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = 0.5 * std::erfc(-kSqrtHalf * x[i]);
  return x;
}

// tanh, or where a result of 16 bits is made of it (`coarse`) to 4e-7 of itself: x P(x²) / Q(x²), fitted on [0, 9] to
// least greatest relative error.
template <bool coarse, class A> VCL_IN_LOOP Vec<A> tanh_of(Vec<A> x) {
  if constexpr (coarse) {
    constexpr float p[] = {1.9219422e-05f, 0.00526409922f, 0.236651525f, 1.84374928f};
    constexpr float q[] = {3.95607117e-07f, 0.000415375194f, 0.0431806594f, 0.851229548f, 1.84375f};
    const Vec<float> within = clamped<float>(x, -9, 9), square = within * within;
    return within * polynomial(p, square) * reciprocal(polynomial(q, square));
  } else {
    return tanh<A>(x);
  }
}

template <class A> VCL_IN_LOOP Vec<A> gelu_tanh_argument(Vec<A> x) {
  return A(kGeluSlope) * (x + A(kGeluCubic) * x * x * x);
}

// T: what the result will be rounded to. Of 16 bits it allows a coarser computation.
template <Activation act, class T, class A = acc_t<T>> VCL_IN_LOOP Vec<A> activate(Vec<A> x, A parameter) {
  if constexpr (act == Activation::identity) return x;
  if constexpr (act == Activation::relu) return x <= A(0) ? Vec<A>{} : x;
  if constexpr (act == Activation::leaky_relu) return x > A(0) ? x : x * parameter;
  if constexpr (act == Activation::elu)
    return x > A(0) ? x : parameter * expm1_below_0<A>(clamped<A>(x, Exp<A>::flat, A(0)));
  if constexpr (act == Activation::gelu) return x * normal_cdf<sizeof(T) == 2>(x, sizeof(A) == 4 ? gauss(x) : x);
  if constexpr (act == Activation::gelu_tanh) return x / (A(1) + exp<A>(-gelu_tanh_argument<A>(x)));
  if constexpr (act == Activation::silu) return x / (A(1) + exp<A>(-x));
  if constexpr (act == Activation::tanh) return tanh_of<sizeof(T) == 2, A>(x);
}

// dy times the derivative, which follows from s: y if from_output, else x.
template <Activation act, bool from_output, class T, class A = acc_t<T>>
VCL_IN_LOOP Vec<A> activation_gradient(Vec<A> s, Vec<A> dy, A parameter) {
  if constexpr (act == Activation::identity) return dy;
  if constexpr (act == Activation::relu) return s <= A(0) ? Vec<A>{} : in_register(dy);
  if constexpr (act == Activation::leaky_relu) return s > A(0) ? dy : dy * parameter;
  if constexpr (act == Activation::elu) {
    if constexpr (from_output) return s > A(0) ? dy : dy * (s + parameter);
    else return s > A(0) ? dy : dy * parameter * exp<A>(clamped<A>(s, A(-700), A(0)));
  }
  if constexpr (act == Activation::tanh) {
    const Vec<A> y = from_output ? s : tanh_of<sizeof(T) == 2, A>(s);
    return dy * (A(1) - y * y);
  }
  if constexpr (act == Activation::gelu) {
    const Vec<A> density = gauss(s);
    return dy * (normal_cdf<sizeof(T) == 2>(s, density) + s * (A(kDensityAt0) * density));
  }
  if constexpr (act == Activation::gelu_tanh) {
    const Vec<A> x = clamped<A>(s, sizeof(A) == 4 ? -10 : -20, 40);  // beyond, it is 0 or 1, and powers overflow
    const Vec<A> e = exp<A>(-gelu_tanh_argument<A>(x)), sigmoid = A(1) / (A(1) + e);
    const Vec<A> slope = A(kGeluSlope) * (A(1) + A(3 * kGeluCubic) * x * x);
    return dy * sigmoid * (A(1) + x * (e * sigmoid) * slope);  // 1 - sigmoid would lose digits
  }
  if constexpr (act == Activation::silu) {
    const Vec<A> sigmoid = A(1) / (A(1) + exp<A>(-s));
    return dy * sigmoid * (A(1) + s * (A(1) - sigmoid));
  }
}

// Calls f with the activation as a constant.
template <class F> VCL_IN_LOOP void with_activation(Activation act, F&& f) {
  unrolled<kActivations>([&] [[gnu::always_inline]] (auto i) {
    constexpr Activation constant = static_cast<Activation>(i());
    if (act == constant) f(std::integral_constant<Activation, constant>());
  });
}

// y = activation(x) over a run; with `stream`, y begins on a whole vector.
template <class T, bool stream> void activate_run(ActivationSpec activation, const T* x, T* y, int64_t len) {
  using A = acc_t<T>;
  const A parameter = A(activation.parameter);
  with_activation(activation.kind, [=](auto act) {
    for (int64_t q = 0; q < len; q += lanes<A>) {
      store_up_to<stream>(y + q, activate<act(), T>(load_up_to(x + q, len - q), parameter), len - q);
    }
  });
}

// dx = dy · activation'(s) over a run; s is y if from_output, else x.
template <class T, bool stream>
void activation_gradient_run(ActivationSpec activation, bool from_output, const T* s, const T* dy, T* dx, int64_t len) {
  using A = acc_t<T>;
  const A parameter = A(activation.parameter);
  with_activation(activation.kind, [=](auto act) {
    with_flag(from_output, [=](auto output) {
      for (int64_t q = 0; q < len; q += lanes<A>) {
        const Vec<A> s_at = load_up_to(s + q, len - q), dy_at = load_up_to(dy + q, len - q);
        store_up_to<stream>(dx + q, activation_gradient<act(), output(), T>(s_at, dy_at, parameter), len - q);
      }
    });
  });
}

}  // namespace vcl::VCL_ISA

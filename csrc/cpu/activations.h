// Activation functions and their derivatives, in the accumulation type.
// Included inside the namespace of one instruction set.
#pragma once

// Keeps a load apart from the choice of its lanes: a load under a mask that is still being computed halves the speed.
template <class V> inline V in_register(V v) {
#if VCL_LEVEL >= 2
  asm("" : "+v"(v));
#endif
  return v;
}

// exp(-x² / 2). In float32 less exact than exp, and shorter.
inline Vec<double> gauss(Vec<double> x) { return exp(clamped<double>(-0.5 * x * x, -708, 0)); }
VCL_IN_LOOP Vec<float> gauss(Vec<float> x) {
  const Vec<float> at = -0.5f * x * x;
  const Reduced of = reduced(at);
  // exp(r), fitted to least greatest relative error, 8e-8
  constexpr float from_highest[] = {0.00829764970f, 0.0419154199f, 0.166675750f, 0.499988945f, 0.999999692f, 1.00000007f};
  return at < -87.0f ? Vec<float>{} : times_power(polynomial(from_highest, of.r), of.power);
}

// exp(a²) erfc(a) of a >= 0 to 3e-7 of itself, or 1e-6 where a result of 16 bits is made of it (`coarse`): t times a
// polynomial in t = 1 / (1 + a / 2), fitted to least greatest relative error on [0, 9.5]. Beside gauss, which the
// density needs as well, it is much less work than erf.
template <bool coarse> VCL_IN_LOOP Vec<float> scaled_erfc(Vec<float> a) {
  constexpr float fine[] = {0.0138569782f, -0.131642446f, 0.44823283f, -0.695125997f, 0.441543728f,
                            -0.108824871f, 0.229028299f,  0.237932801f, 0.282938063f, 0.282060593f};
  constexpr float short_one[] = {0.0891232617f, -0.359978232f, 0.393768431f, 0.0346663886f,
                                 0.282716721f,  0.277354203f,  0.282348044f};
  const Vec<float> t = reciprocal(1.0f + 0.5f * a);
  return (coarse ? polynomial(short_one, t) : polynomial(fine, t)) * t;
}

// The standard normal's distribution function, given gauss(x).
template <bool coarse> VCL_IN_LOOP Vec<float> normal_cdf(Vec<float> x, Vec<float> gauss_x) {
  const Vec<float> a = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vec<float> tail = 0.5f * gauss_x * scaled_erfc<coarse>(a > 10.0f ? broadcast<float>(10) : a);
  return x < 0.0f ? tail : 1.0f - tail;
}
template <bool> inline Vec<double> normal_cdf(Vec<double> x, Vec<double>) {
  return 0.5 * (1 + erf(x * 0.70710678118654752440));
}

// tanh, or where a result of 16 bits is made of it (`coarse`) to 4e-7 of itself: x P(x²) / Q(x²), fitted on [0, 9] to
// least greatest relative error.
template <bool coarse> VCL_IN_LOOP Vec<float> tanh_of(Vec<float> x) {
  if constexpr (!coarse) return tanh(x);
  constexpr float p[] = {1.9219422e-05f, 0.00526409922f, 0.236651525f, 1.84374928f};
  constexpr float q[] = {3.95607117e-07f, 0.000415375194f, 0.0431806594f, 0.851229548f, 1.84375f};
  const Vec<float> within = clamped<float>(x, -9, 9), square = within * within;
  return within * polynomial(p, square) * reciprocal(polynomial(q, square));
}
template <bool> inline Vec<double> tanh_of(Vec<double> x) { return tanh(x); }

// gelu's approximation: x / 2 · (1 + tanh(a / 2)) = x · sigmoid(a)
template <class A> VCL_IN_LOOP Vec<A> gelu_tanh_argument(Vec<A> x) {
  return A(2 * 0.79788456080286535588) * (x + A(0.044715) * x * x * x);
}

// In float32 `T` may be narrower: what is computed is then rounded to it.
template <Activation act, class T, class A = acc_t<T>> VCL_IN_LOOP Vec<A> value(Vec<A> x, A parameter) {
  if constexpr (act == Activation::identity) return x;
  if constexpr (act == Activation::relu) return x <= A(0) ? Vec<A>{} : x;
  if constexpr (act == Activation::leaky_relu) return x > A(0) ? x : x * parameter;
  if constexpr (act == Activation::elu) return x > A(0) ? x : parameter * expm1_below_0(clamped<A>(x, kFlat<A>, A(0)));
  if constexpr (act == Activation::gelu) return x * normal_cdf<sizeof(T) == 2>(x, sizeof(A) == 4 ? gauss(x) : x);
  if constexpr (act == Activation::gelu_tanh) return x / (A(1) + exp(-gelu_tanh_argument<A>(x)));
  if constexpr (act == Activation::silu) return x / (A(1) + exp(-x));
  if constexpr (act == Activation::tanh) return tanh_of<sizeof(T) == 2>(x);
}

// dy times the derivative, which follows from `s`: y if from_output, else x.
template <Activation act, bool from_output, class T, class A = acc_t<T>>
VCL_IN_LOOP Vec<A> derivative(Vec<A> s, Vec<A> dy, A parameter) {
  if constexpr (act == Activation::identity) return dy;
  if constexpr (act == Activation::relu) return s <= A(0) ? Vec<A>{} : in_register(dy);
  if constexpr (act == Activation::leaky_relu) return s > A(0) ? dy : dy * parameter;
  if constexpr (act == Activation::elu) {
    if constexpr (from_output) return s > A(0) ? dy : dy * (s + parameter);
    else return s > A(0) ? dy : dy * parameter * exp(clamped<A>(s, A(-700), A(0)));
  }
  if constexpr (act == Activation::tanh) {
    const Vec<A> y = from_output ? s : tanh_of<sizeof(T) == 2>(s);
    return dy * (A(1) - y * y);
  }
  if constexpr (act == Activation::gelu) {
    const Vec<A> density = gauss(s);
    return dy * (normal_cdf<sizeof(T) == 2>(s, density) + s * (A(0.39894228040143267794) * density));
  }
  if constexpr (act == Activation::gelu_tanh) {
    const Vec<A> x = clamped<A>(s, -40, 40);  // beyond, it is 0 or 1, and powers overflow
    const Vec<A> sigmoid = A(1) / (A(1) + exp(-gelu_tanh_argument<A>(x)));
    const Vec<A> slope = A(2 * 0.79788456080286535588) * (A(1) + A(3 * 0.044715) * x * x);
    return dy * sigmoid * (A(1) + x * (A(1) - sigmoid) * slope);
  }
  if constexpr (act == Activation::silu) {
    const Vec<A> sigmoid = A(1) / (A(1) + exp(-s));
    return dy * sigmoid * (A(1) + s * (A(1) - sigmoid));
  }
}

// Calls f with the activation as a constant.
template <class F> VCL_IN_LOOP void with_activation(Activation act, F&& f) {
  switch (act) {
    case Activation::identity: return f(std::integral_constant<Activation, Activation::identity>());
    case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>());
    case Activation::leaky_relu: return f(std::integral_constant<Activation, Activation::leaky_relu>());
    case Activation::elu: return f(std::integral_constant<Activation, Activation::elu>());
    case Activation::gelu: return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return f(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::tanh: return f(std::integral_constant<Activation, Activation::tanh>());
  }
}

// y = activation(x) over a run of contiguous values; with `stream`, y begins on a whole vector.
template <class T, bool stream> void activate_run(Activation act, double parameter, const T* x, T* y, int64_t len) {
  using A = acc_t<T>;
  with_activation(act, [=](auto a) {
    for (int64_t q = 0; q < len; q += lanes<A>) {
      store_up_to<stream>(y + q, value<a(), T>(load_up_to(x + q, len - q), A(parameter)), len - q);
    }
  });
}

// out = dy · activation'(s) over a run; `s` is y if from_output, else x.
template <class T, bool stream>
void differentiate_run(Activation act, bool from_output, double parameter, const T* s, const T* dy, T* out,
                       int64_t len) {
  using A = acc_t<T>;
  with_activation(act, [=](auto a) {
    const auto each = [=](auto output) {
      for (int64_t q = 0; q < len; q += lanes<A>) {
        const Vec<A> at = load_up_to(s + q, len - q), upstream = load_up_to(dy + q, len - q);
        store_up_to<stream>(out + q, derivative<a(), output(), T>(at, upstream, A(parameter)), len - q);
      }
    };
    if (from_output) each(std::true_type());
    else each(std::false_type());
  });
}

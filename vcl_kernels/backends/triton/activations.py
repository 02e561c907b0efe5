"""Activation functions and their derivatives, elementwise in the accumulation dtype.

They use only functions that Triton has everywhere (exp, erf): the interpreter and every GPU run the same steps.
Every argument of exp is at most 0: nothing overflows, and a NaN comes only from NaN or Inf.
"""

import math

import triton
import triton.language as tl

INVERSE_FACTORIAL = tl.constexpr(tuple(1 / math.factorial(j) for j in range(16)))
# tanh(x) / x = 1 + Σ c_j x^2j, j = 1 … 5, on |x| <= 0.57: the fit whose greatest relative error is least, 2e-9
TANH_NEAR = tl.constexpr((-0.33333311, 0.13332363, -0.05382782, 0.02096743, -0.00612302))

# gelu_tanh takes the sigmoid of a (x + b x³) for Φ(x), a = 2 √(2 / π)
GELU_TANH = tl.constexpr((1.5957691216057308, 0.044715))


@triton.jit
def activate(x, parameter, ACTIVATION: tl.constexpr, HALF: tl.constexpr):
    """y = activation(x), to be rounded to 16 bits if HALF. ``parameter`` is elu's alpha or leaky_relu's slope."""
    parameter = tl.full(x.shape, parameter, x.dtype)
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * parameter)
    elif ACTIVATION == "elu":
        return tl.where(x <= 0, parameter * expm1(tl.minimum(x, 0.0), HALF), x)
    elif ACTIVATION == "gelu":
        return x * normal_cdf(x, HALF)
    elif ACTIVATION == "gelu_tanh":
        share, _ = sigmoid(gelu_tanh_argument(saturated(x)), HALF)
        return x * share
    elif ACTIVATION == "silu":
        share, _ = sigmoid(x, HALF)
        return x * share
    elif ACTIVATION == "tanh":
        return hyperbolic_tangent(x, HALF)
    else:
        tl.static_assert(False, "unknown ACTIVATION")


@triton.jit
def activation_gradient(saved, dy, parameter, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr):
    """dy · activation', from saved y (FROM_OUTPUT, where the derivative follows from y) or saved x."""
    parameter = tl.full(dy.shape, parameter, dy.dtype)
    if ACTIVATION == "identity":
        return dy
    elif ACTIVATION == "relu":
        return tl.where(saved <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        return tl.where(saved > 0, dy, dy * parameter)
    elif ACTIVATION == "elu":
        slope = saved + parameter if FROM_OUTPUT else parameter * tl.exp(tl.where(saved > 0, 0.0, saved))
        return tl.where(saved > 0, dy, dy * slope)
    elif ACTIVATION == "gelu":
        bounded = saturated(saved)
        density = 0.3989422804014327 * tl.exp(-0.5 * bounded * bounded)
        return dy * (normal_cdf(saved, False) + saved * density)
    elif ACTIVATION == "gelu_tanh":
        bounded = saturated(saved)
        share, complement = sigmoid(gelu_tanh_argument(bounded), False)
        inner = GELU_TANH[0] * (1.0 + 3.0 * GELU_TANH[1] * bounded * bounded)
        return dy * (share + saved * (share * complement) * inner)
    elif ACTIVATION == "silu":
        share, complement = sigmoid(saved, False)
        return dy * share * (1.0 + saved * complement)
    elif ACTIVATION == "tanh" and FROM_OUTPUT:
        return dy * (1.0 - saved * saved)
    elif ACTIVATION == "tanh":
        e = tl.exp(-2.0 * tl.abs(saved))
        return dy * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    else:
        tl.static_assert(False, "unknown ACTIVATION")


@triton.jit
def expm1(x, HALF: tl.constexpr):
    """exp(x) - 1 for x <= 0: near 0 the series, whose next term is below a rounding of x (HALF: of 16 bits)."""
    NEAR: tl.constexpr = -0.015625 if HALF else -0.5
    TERMS: tl.constexpr = 2 if HALF else 15 if x.dtype == tl.float64 else 8
    near = tl.where(x > NEAR, x, 0.0)
    series = tl.full(x.shape, INVERSE_FACTORIAL[TERMS], x.dtype)
    for j in tl.static_range(TERMS - 1, 0, -1):
        series = INVERSE_FACTORIAL[j] + series * near
    return tl.where(x > NEAR, near * series, tl.exp(x) - 1.0)


@triton.jit
def hyperbolic_tangent(x, HALF: tl.constexpr):
    """tanh(x). In float32 a GPU's exp and quotient are off by some roundings: far from 0 they are in a small term."""
    NEAR: tl.constexpr = 0.57
    size = tl.abs(x)
    if HALF:  # near 0, where 1 - e cancels, x - x³ / 3
        e = tl.exp2(size * -2.8853900817779268)
        near = tl.minimum(size, 0.015625)
        found = tl.where(size < 0.015625, near - near * (near * near) * 0.33333333, (1.0 - e) * inverse(1.0 + e, HALF))
    elif x.dtype == tl.float64:
        negative = expm1(-2.0 * size, False)
        found = -negative / (2.0 + negative)
    else:
        e = tl.exp(-2.0 * size)
        far = 1.0 - 2.0 * e / (1.0 + e)
        near = tl.where(size < NEAR, size, 0.0)
        square = near * near
        series = tl.full(x.shape, TANH_NEAR[4], x.dtype)
        for j in tl.static_range(3, -1, -1):
            series = TANH_NEAR[j] + series * square
        found = tl.where(size < NEAR, near + near * (square * series), far)
    return tl.where(x < 0, -found, found)


@triton.jit
def inverse(x, HALF: tl.constexpr):
    """1 / x for x > 0. To 16 bits: a quotient takes three times the instructions of a root."""
    if HALF:
        root = tl.rsqrt(x)
        return root * root
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x, HALF: tl.constexpr):
    """σ(x) and 1 - σ(x), neither by cancellation."""
    e = tl.exp(-tl.abs(x))
    more = inverse(1.0 + e, HALF)
    less = e * more
    return tl.where(x < 0, less, more), tl.where(x < 0, more, less)


@triton.jit
def normal_cdf(x, HALF: tl.constexpr):
    """Φ(x) of the standard normal distribution. To 16 bits without erf, which takes one branch or the other."""
    if HALF:  # Φ(-|x|) = exp(-x²/2) · t · (a polynomial of t), t = 1 / (1 + 0.2316419 |x|): Abramowitz & Stegun 26.2.17
        size = tl.minimum(tl.abs(x), 40.0)
        t = inverse(1.0 + 0.2316418882 * size, HALF)
        tail = 0.5307027146 * t - 0.7265760135
        tail = ((tail * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
        tail = tail * t * tl.exp2(size * size * -0.7213475204444817)
        return tl.where(x < 0, tail, 1.0 - tail)
    else:
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gelu_tanh_argument(x):
    """Return what gelu_tanh takes the sigmoid of."""
    return GELU_TANH[0] * (x + GELU_TANH[1] * x * x * x)


@triton.jit
def saturated(x):
    """x within bounds, so that its powers do not overflow. Past them gelu equals its limits even in float64."""
    return tl.minimum(tl.maximum(x, -40.0), 40.0)

"""The variance at which the ratio is least in expectation: beta asks for that multiple of itself."""

from __future__ import annotations

import math
from functools import lru_cache

from .checks import check_count

__all__ = ["variance_over_beta"]

POINTS = 200  # of the integral; twenty times as many change the result by less than 1e-5, for M up to 1e6
LEFT_OUT = 40.0  # ends of the integral are where the density has fallen by exp of this, or more
GOLDEN = (math.sqrt(5) - 1) / 2


@lru_cache(4096)
def variance_over_beta(M: int) -> float:
    r"""Return variance / beta where the expectation of the ratio form is least, for Gaussian values.

    With s = variance / beta, d = M - 1, and sample variances ``s a`` and ``s b`` (over beta) of two sub-batches of M
    values, a and b independent and distributed as chi²_d / d, the expectation of ``(1 - s a / (s b + 1))²`` over a is
    ``((s (b - 1) + 1)² + 2 s² / d) / (s b + 1)²``. It is integrated over log b and minimised over log s.

    Raises:
        TypeError, ValueError: M is no integer of at least 2.

    >>> round(variance_over_beta(5), 2), round(variance_over_beta(250))
    (1.03, 32)
    """
    check_count("M", M, 2)
    d = M - 1
    weights = _density_of_log(d)

    def loss(log_s: float) -> float:
        s = math.exp(log_s)
        return sum(w * ((s * b1 + 1) ** 2 + 2 * s * s / d) / (s * b1 + s + 1) ** 2 for b1, w in weights)

    low, high = math.log(0.1), math.log(M)  # it is 0.38 for M = 2, and about M / 8 for many
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    losses = [loss(inner[0]), loss(inner[1])]
    while high - low > 1e-6:
        if losses[0] < losses[1]:
            high = inner[1]
            inner = [high - GOLDEN * (high - low), inner[0]]
            losses = [loss(inner[0]), losses[0]]
        else:
            low = inner[0]
            inner = [inner[1], low + GOLDEN * (high - low)]
            losses = [losses[1], loss(inner[1])]
    return math.exp((low + high) / 2)


def _density_of_log(d: int) -> list[tuple[float, float]]:
    """Return points b - 1 and their weights, which sum to 1, for b distributed as chi²_d / d.

    Of t = log b the density is proportional to ``exp(d / 2 (t - exp(t)))``. It falls off slowly to the left.
    """
    width = math.sqrt(2 * LEFT_OUT / d)
    left, right = -(2 * LEFT_OUT / d + width), math.log1p(2 * LEFT_OUT / d) + width
    points = [left + (right - left) * i / (POINTS - 1) for i in range(POINTS)]
    weights = [math.exp(d / 2 * (t - math.expm1(t))) for t in points]
    total = sum(weights)
    return [(math.expm1(t), w / total) for t, w in zip(points, weights, strict=True)]

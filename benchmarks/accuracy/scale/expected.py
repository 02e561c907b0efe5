"""The expectation of the ratio form for Gaussian values, as a function of variance / beta."""

from __future__ import annotations

import numpy as np

POINTS = 2000  # of the integral; ten times as many change the result by less than 1e-9
LEFT_OUT = 1e-17  # probability that the integral leaves out at each end


def expected_ratio(s: float | np.ndarray, M: int) -> np.ndarray:
    r"""Return the expectation of ``(1 - v_a / (v_b + beta))²`` for Gaussian values.

    Args:
        s: variance / beta, of any shape, which the result has too.
        M: values in a sub-batch, at least 2.

    ``v_a / beta = s a`` and ``v_b / beta = s b``: a and b are independent and distributed as chi²_d / d, d = M - 1.
    The expectation over a is ``((1 + s b - s)² + 2 s² / d) / (1 + s b)²``. It is integrated over log b.
    """
    from scipy.stats import chi2

    d = M - 1
    log_b = np.linspace(np.log(chi2.ppf(LEFT_OUT, d) / d), np.log(chi2.isf(LEFT_OUT, d) / d), POINTS)
    b = np.exp(log_b)
    weights = chi2.pdf(d * b, d) * d * b * (log_b[1] - log_b[0])
    s = np.asarray(s, dtype=float)[..., None]
    return (((1 + s * b - s) ** 2 + 2 * s * s / d) / (1 + s * b) ** 2) @ weights


def least(M: int) -> tuple[float, float]:
    """Return the variance / beta at which the expectation is least, and the expectation there."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_s: float(expected_ratio(np.exp(log_s), M)),
        bounds=(np.log(0.1), np.log(M)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(np.exp(found.x)), float(found.fun)


def slope(s: float, M: int) -> float:
    """Return the derivative of the expectation by the logarithm of the variance: how hard, and which way, it pulls."""
    step = 1e-4
    low, high = expected_ratio(np.array([s * np.exp(-step), s * np.exp(step)]), M)
    return float(high - low) / (2 * step)

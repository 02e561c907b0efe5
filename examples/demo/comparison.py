"""Paired differences over splits, and what may be said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """Mean over splits of what one method has more than another, and half of its 95 % interval (Student's t)."""

    mean: float
    half: float  # NaN with fewer than two splits
    splits: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half

    def shown(self, digits: int) -> str:
        """Return the mean, and the half-width where there is one."""
        mean = f"{self.mean:+.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Return mean and half-width t(0.975, S - 1)·s/√S of a - b, pair by pair: of the same split.

    Raises:
        ValueError: the two are not of equal length, or empty.
    """
    import numpy as np
    from scipy.stats import sem, t

    if len(a) != len(b) or not a:
        raise ValueError(f"wants pairs, got {len(a)} and {len(b)} values")
    differences = np.subtract(a, b)
    half = sem(differences) * t.ppf(0.975, len(a) - 1) if len(a) > 1 else math.nan
    return Difference(float(differences.mean()), float(half), len(a))


def sentence(method: str, other: str, error: Difference, nll: Difference) -> str:
    """Say what the differences of ``method`` from ``other`` show, and whether that is decided."""
    if math.isnan(error.half) or math.isnan(nll.half):
        return f"{method} against {other}: nothing is decided by {error.splits} split(s)."
    parts = [
        said("test error", error, f"{error.shown(2)} points"),
        said("negative log-likelihood", nll, nll.shown(3)),
    ]
    return f"{method} against {other}, {error.splits} splits: {'; '.join(parts)}."


def said(what: str, difference: Difference, shown: str) -> str:
    if not difference.decided:
        return f"the difference in {what} is not decided ({shown}: the 95 % interval includes 0)"
    way = "lower" if difference.mean < 0 else "higher"
    return f"{what} is {way} ({shown}: decided, the 95 % interval excludes 0)"

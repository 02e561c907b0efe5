"""Errors of two methods, paired by seed: the difference, how sure it is, and what may be said of it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, TypeVar

from scipy import stats

from .results import mean_and_error
from .statistics import holm

SAME_WITHIN = 0.5  # points: with the whole interval within ± this, the verdict is "the same"
LEAST_SEEDS = 5  # with fewer there is no verdict
LEVEL = 0.05
VERDICTS = ("better", "worse", "the same", "undecided", "too few seeds")
Key = TypeVar("Key", bound=Hashable)


class Comparison(NamedTuple):
    """A method against another; a gain above 0 is in its favour."""

    gain: float  # mean over seeds, points
    half: float  # of the 95 % interval (Student's t)
    seeds: int
    p: float  # of the paired t-test; corrected by Holm after ``judge``
    verdict: str = ""

    def __str__(self) -> str:
        """The difference in error, with its interval; then p and verdict, where there are."""
        said = f", {self.verdict}" if self.verdict else ""
        p = f", p = {self.p:.2g}" if self.verdict not in ("", "too few seeds") else ""
        return f"{-self.gain:+.2f} ± {self.half:.2f}{p}{said}"


def paired(errors: dict[int, float], base: dict[int, float]) -> Comparison | None:
    """Compare errors with those of another method on the same seeds; None where they share no seed."""
    gains = [base[seed] - errors[seed] for seed in errors if seed in base]
    if not gains:
        return None
    varied = len(set(gains)) > 1
    p = float(stats.ttest_1samp(gains, 0).pvalue) if varied else float(gains[0] == 0)
    return Comparison(*mean_and_error(gains), len(gains), p)


def judge(family: dict[Key, Comparison]) -> dict[Key, Comparison]:
    """Return the comparisons of one planned family with Holm's correction for their number, and verdicts."""
    enough = {key: found for key, found in family.items() if found.seeds >= LEAST_SEEDS}
    corrected = dict(zip(enough, holm([found.p for found in enough.values()]), strict=True))
    judged = {}
    for key, found in family.items():
        p = corrected.get(key)
        said = "too few seeds" if p is None else verdict(found.gain, found.half, p)
        judged[key] = found._replace(p=found.p if p is None else p, verdict=said)
    return judged


def verdict(gain: float, half: float, p: float) -> str:
    """Return what may be said of a gain with that interval and corrected p."""
    if p < LEVEL and abs(gain) > half:
        return "better" if gain > 0 else "worse"
    return "the same" if abs(gain) + half <= SAME_WITHIN else "undecided"


def cell(errors: dict[int, float], base: dict[int, float]) -> str:
    """Return the difference of errors from those of another method, where it is not one of the planned family."""
    found = paired(errors, base)
    return "" if found is None else str(found)

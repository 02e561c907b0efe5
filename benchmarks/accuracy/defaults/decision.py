"""The rule of PLAN-defaults.md: which candidate becomes the default."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ..comparisons import LEVEL, Comparison, paired
from ..statistics import holm
from ..work import Record
from .choice import setting_of
from .settings import NONE, Setting

HARM_ERROR, HARM_NLL = 0.5, 1.1  # points above, and times, those without normalisation
WITHIN = 2.0  # a variance is at its target if it is within this factor
STEADIER = 0.9  # of the constancy without VCL, at most
Runs = dict[int, list[Record]]  # by seed; of tables one for each set


class Judged(NamedTuple):
    """What became of one setting on one network."""

    error: Comparison  # with no normalisation; a gain above 0 is in favour
    nll: Comparison
    nll_ratio: float  # to that without normalisation
    at_target: float  # share of the layers whose variance is within a factor of two of the one that beta asks for
    at_target_without: float  # the same without VCL, against the same target
    constancy_ratio: float  # median over layers, to that without normalisation
    gains: bool = False

    @property
    def acts(self) -> bool:
        """By scale or by constancy."""
        by_scale = self.at_target >= 0.5 and self.at_target > self.at_target_without
        return by_scale or self.constancy_ratio <= STEADIER

    @property
    def harms(self) -> bool:
        """In error or in negative log-likelihood: beyond the margin, and the interval leaves out 0."""
        in_error = -self.error.gain > max(HARM_ERROR, self.error.half)
        return in_error or (self.nll_ratio > HARM_NLL and -self.nll.gain > self.nll.half)


Judgement = dict[str, Judged]  # by network


def judge(records: Iterable[Record], beside: Mapping[Setting, Setting] | None = None) -> dict[Setting, Judgement]:
    """Return each method's judgement on each network of which there are runs of it.

    Each is judged beside no normalisation. With ``beside`` only its keys are, each beside its value.
    """
    runs: dict[tuple[Setting, str], Runs] = {}
    for record in records:
        of = runs.setdefault((setting_of(record), record["network"]), {})
        of.setdefault(record["seed"], []).append(record)
    judged: dict[Setting, Judgement] = {}
    for (setting, network), of in runs.items():
        other = NONE if beside is None else beside.get(setting, setting)
        if setting != other and (other, network) in runs:
            judged.setdefault(setting, {})[network] = _on_network(setting, of, runs[other, network])
    return {setting: _with_gains(judgement) for setting, judgement in judged.items()}


def decide(judged: dict[Setting, Judgement]) -> Setting | None:
    """Return the setting with the best score of those that act everywhere, harm nowhere and gain somewhere."""
    passing = [setting for setting, judgement in judged.items() if setting.vcl is not None and passes(judgement)]
    return min(passing, key=lambda setting: score(judged[setting]), default=None)


def passes(judgement: Judgement) -> bool:
    """Whether a setting can be the default."""
    on = judgement.values()
    return all(j.acts for j in on) and not any(j.harms for j in on) and any(j.gains for j in on)


def score(judgement: Judgement) -> float:
    """Return the mean over networks of log(nll / nll without normalisation)."""
    return statistics.fmean(math.log(judged.nll_ratio) for judged in judgement.values())


def _on_network(setting: Setting, runs: Runs, none: Runs) -> Judged:
    seeds = [seed for seed in runs if seed in none and len(runs[seed]) == len(none[seed])]
    own = {seed: runs[seed] for seed in seeds}
    base = {seed: none[seed] for seed in seeds}
    error, nll = (paired(_means(own, column), _means(base, column)) for column in ("error", "nll"))
    assert error is not None
    assert nll is not None
    ratio = _mean(own, "nll") / _mean(base, "nll")
    pairs = [(a, b) for seed in seeds for a, b in zip(by_set(own[seed]), by_set(base[seed]), strict=True)]
    variance = f"{setting.unit or 'activation'}_variance"
    shares = [(_at_target(a, a["target"], variance), _at_target(b, a["target"], variance)) for a, b in pairs]
    steady = statistics.fmean(_median(a) for a, _ in pairs) / statistics.fmean(_median(b) for _, b in pairs)
    at_target, without = (statistics.fmean(share) for share in zip(*shares, strict=True))
    return Judged(error, nll, ratio, at_target, without, steady)


def _with_gains(judgement: Judgement) -> Judgement:
    """Say where error or likelihood are better, by p after Holm's correction over the networks."""

    def better(of: Callable[[Judged], Comparison]) -> list[bool]:
        found = [of(judged) for judged in judgement.values()]
        return [c.gain > 0 and p < LEVEL for c, p in zip(found, holm([c.p for c in found]), strict=True)]

    gains = [a or b for a, b in zip(better(lambda j: j.error), better(lambda j: j.nll), strict=True)]
    return {n: j._replace(gains=gain) for (n, j), gain in zip(judgement.items(), gains, strict=True)}


def by_set(records: list[Record]) -> list[Record]:
    """Return a seed's runs in the order of their tables."""
    return sorted(records, key=lambda record: str(record["set"]))


def _means(runs: Runs, column: str) -> dict[int, float]:
    return {seed: statistics.fmean(record[column] for record in of) for seed, of in runs.items()}


def _mean(runs: Runs, column: str) -> float:
    return statistics.fmean(_means(runs, column).values())


def numbers(text: object) -> list[float]:
    """Return the layers' values of a column."""
    return [float(value) for value in str(text).split()]


def _median(record: Record) -> float:
    return statistics.median(numbers(record["constancy"]))


def _at_target(record: Record, target: object, variance: str) -> float:
    pairs = list(zip(numbers(record[variance]), numbers(target), strict=True))
    return sum(1 / WITHIN <= v / t <= WITHIN for v, t in pairs) / len(pairs)

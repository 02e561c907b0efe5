"""The rules of PLAN-defaults.md: which rate, which candidates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from ..work import Record
from .settings import AUTHORS, BETAS, NONE, TODAY, Setting
from .tasks import SCREENED

Place = tuple[Setting, str, str]  # method, network, table
MOST_HARM = 1.0  # points of validation error above no normalisation, in phase 1
MORE = 2  # candidates beside the best of each kind


def setting_of(record: Record) -> Setting:
    """Return the method of a record, read from a file or not."""
    values = {name: record[name] for name in Setting._fields}
    return Setting(**values | {"beta": str(values["beta"])})


def place_of(record: Record) -> Place:
    """Return the method, network and table of a record."""
    return setting_of(record), record["network"], record["set"]


def best_runs(records: Iterable[Record]) -> dict[Place, Record]:
    """Return for each method and place the run at the better rate: lower error, then lower likelihood loss."""
    best: dict[Place, Record] = {}
    for record in records:
        place = place_of(record)
        if place not in best or (record["error"], record["nll"]) < (best[place]["error"], best[place]["nll"]):
            best[place] = record
    return best


def best_rates(records: Iterable[Record]) -> dict[Place, float]:
    """Return the better learning rate of each method in each place."""
    return {place: record["learning_rate"] for place, record in best_runs(records).items()}


def screen_scores(records: Iterable[Record]) -> dict[Setting, float | None]:
    """Return each setting's score, mean log(nll / nll without normalisation); None where it harms too much."""
    best = best_runs(records)
    networks = [network for network in SCREENED if (NONE, network, "") in best]
    scores: dict[Setting, float | None] = {}
    for setting in dict.fromkeys(place[0] for place in best):
        runs = [(best[setting, network, ""], best[NONE, network, ""]) for network in networks]
        harms = any(run["error"] - none["error"] > MOST_HARM for run, none in runs)
        scores[setting] = None if harms else statistics.fmean(math.log(run["nll"] / none["nll"]) for run, none in runs)
    return scores


def candidates(records: Iterable[Record]) -> list[Setting]:
    """Return the settings that phase 2 compares."""
    scores = screen_scores(records)
    order = sorted((s for s, score in scores.items() if score is not None and s.vcl is not None), key=scores.get)  # type: ignore[arg-type]
    chosen = [next((s for s in order if s.method == "ratio" and s.beta == beta), None) for beta in BETAS]
    chosen.append(next((s for s in order if s.method == "relative_variance"), None))
    found = list(dict.fromkeys(s for s in chosen if s is not None))
    found += [s for s in order if s not in found][:MORE]
    return list(dict.fromkeys([*found, TODAY, AUTHORS]))

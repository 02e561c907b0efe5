"""The suites as pytest-benchmark entries: one for each candidate and phase of a contest. ``python -m benchmarks.run``.

A contest is raced when its first entry is reached; the entries then hand its times to pytest-benchmark, by a clock
that stands still but for them. Rounds are so shared by all candidates, and times can come from a GPU's events.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .contest import Contest, Outcome
from .suites import SUITES


class Replay:
    """A clock that shows the sum of the times handed to it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


replay = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contests = SUITES[config.getoption("suite")](device, config.getoption("rehearse"))
    entries = [(c, name, phase) for c in contests for name in c.factories for phase in c.phases(name)]
    metafunc.parametrize(
        ("contest", "candidate", "phase"), entries, ids=[f"{c.name}: {name}: {phase}" for c, name, phase in entries]
    )


@pytest.fixture(scope="session")
def outcome(request: pytest.FixtureRequest) -> Callable[[Contest], Outcome]:
    """Race each contest once, as long as time is left; only the latest is kept."""
    budget = request.config.getoption("budget")
    end = time.monotonic() + budget if budget else float("inf")
    latest: list[tuple[Contest, Outcome]] = []

    def of(contest: Contest) -> Outcome:
        if not latest or latest[0][0] is not contest:
            latest.clear()
            gc.collect()
            torch.compiler.reset()
            if time.monotonic() >= end:
                request.session.shouldstop = "no time left"
                pytest.skip("no time left")
            latest.append((contest, _outcome(contest)))
        return latest[0][1]

    return of


def _outcome(contest: Contest) -> Outcome:
    """Race; an error of the race itself is that of each candidate, and is met once."""
    try:
        return contest.run()
    except Exception as error:
        return Outcome(errors=dict.fromkeys(contest.factories, error))


@pytest.mark.benchmark(timer=replay, disable_gc=False)
def test_candidate(
    contest: Contest, candidate: str, phase: str, outcome: Callable[[Contest], Outcome], benchmark: Any
) -> None:
    found = outcome(contest)
    if candidate in found.errors:
        raise found.errors[candidate]
    samples = found.samples[candidate][phase]
    benchmark.group = contest.name
    benchmark.extra_info.update(
        {"case": contest.name, **contest.info, "candidate": candidate, "phase": phase}
        | ({"floor_bytes": floor} if (floor := contest.floor(candidate, phase)) else {})
        | ({"held_bytes": found.memory[candidate]} if phase == "both" and candidate in found.memory else {})
    )
    times = itertools.cycle(samples)
    benchmark.pedantic(replay.advance, setup=lambda: ((next(times),), {}), rounds=len(samples))

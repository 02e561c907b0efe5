"""Candidates for one job, timed side by side: each runs once in every round, so that noise and clocks hit all alike.

The order is shuffled from round to round: whoever runs after a large candidate finds the caches cold.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from examples.demo.measure import saved_bytes

PHASES = ("forward", "backward", "both")
FLUSH_BYTES = 1 << 30  # read before each candidate on a GPU: L2 is cold, and clean (what is written there must leave)
FLUSHES = 8  # such reads take 1 to 5 ms: launches queue up meanwhile, so the host is not timed
Samples = dict[str, list[float]]  # seconds in each round, by phase


@dataclass
class Candidate:
    """``forward`` returns tensors to differentiate by ``upstream``; or None, and then there is no backward."""

    forward: Callable[[], list[Tensor] | None]
    upstream: list[Tensor | None] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)  # whose .grad is cleared before each round

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def backward(self, outputs: list[Tensor]) -> None:
        torch.autograd.backward(outputs, self.upstream)


Factories = dict[str, Callable[[], Candidate]]


class Clock(Protocol):
    def lap(self, candidate: Candidate) -> tuple[float, ...]:
        """Run a candidate once; return the seconds of forward, and of backward if it has one."""


class WallClock:
    """Time on the host. On a GPU that is the cost of launching: the kernels are waited for outside the measurement."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def lap(self, candidate: Candidate) -> tuple[float, ...]:
        candidate.clear()
        self.wait()
        times = [time.perf_counter()]
        outputs = candidate.forward()
        times.append(time.perf_counter())
        if outputs is not None:
            candidate.backward(outputs)
            times.append(time.perf_counter())
        self.wait()
        return tuple(b - a for a, b in itertools.pairwise(times))


class EventClock:
    """Time on a GPU between events, with a cold L2."""

    def __init__(self) -> None:
        self.flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self.sum = torch.zeros((), device="cuda")

    def lap(self, candidate: Candidate) -> tuple[float, ...]:
        candidate.clear()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        for _ in range(FLUSHES):
            torch.sum(self.flush, 0, out=self.sum)
        events[0].record()
        outputs = candidate.forward()
        events[1].record()
        if outputs is not None:
            candidate.backward(outputs)
            events[2].record()
        torch.cuda.synchronize()
        recorded = events[:2] if outputs is None else events
        return tuple(1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(recorded))


def race(candidates: dict[str, Candidate], clock: Clock, seconds: float, least: int, most: int) -> dict[str, Samples]:
    """Run rounds for about ``seconds``, at least ``least`` and at most ``most`` of them, after three to warm up."""
    found: dict[str, Samples] = {name: {phase: [] for phase in PHASES} for name in candidates}
    for _ in range(3):
        for candidate in candidates.values():
            clock.lap(candidate)
    turns, order = list(candidates.items()), random.Random(0)
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        order.shuffle(turns)
        for name, candidate in turns:
            laps = clock.lap(candidate)
            for phase, value in zip(PHASES, laps if len(laps) > 1 else (), strict=False):
                found[name][phase].append(value)
            found[name]["both"].append(sum(laps))
    return found


@dataclass
class Outcome:
    """What a contest found of each candidate: its times, the bytes that it holds for backward, or its error."""

    samples: dict[str, Samples] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)


@dataclass
class Contest:
    """Candidates for one job on one input. ``whole`` names those that have no backward of their own."""

    name: str
    factories: Factories
    clock: Callable[[], Clock]
    whole: frozenset[str] = frozenset()
    floor: Callable[[str, str], int | None] = lambda _candidate, _phase: None  # bytes that must move
    memory: Callable[[Candidate], int] | None = None  # bytes held for backward; by default those of saved tensors
    seconds: float = 4.0
    least: int = 7
    most: int = 101
    info: dict[str, Any] = field(default_factory=dict)

    def phases(self, candidate: str) -> tuple[str, ...]:
        return ("both",) if candidate in self.whole else PHASES

    def run(self, names: Iterable[str] | None = None) -> Outcome:
        """Race the candidates, or those of ``names``; one that raises an error drops out, and its error is kept."""
        outcome, able = Outcome(), {}
        chosen = {name: self.factories[name] for name in (self.factories if names is None else names)}
        try:
            clock = self.clock()
            for name, make in chosen.items():
                try:
                    candidate = make()
                    clock.lap(candidate)
                    if self.memory is not None:
                        outcome.memory[name] = self.memory(candidate)
                    elif name not in self.whole:
                        outcome.memory[name] = saved_bytes(candidate.forward, candidate.leaves[1:])
                    able[name] = candidate
                except Exception as error:  # out of memory, or not supported here
                    outcome.errors[name] = error
            outcome.samples = race(able, clock, self.seconds, self.least, self.most)
        except Exception as error:  # of the race itself: every candidate has it, and it is met once
            outcome = Outcome(errors=dict.fromkeys(chosen, error))
        return outcome

"""Candidates timed side by side: each runs once in every round, so that noise and clocks hit all alike.

The order is shuffled from round to round: who runs first after a large one finds the caches cold.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

PHASES = ("forward", "backward", "both")
FLUSH_BYTES = 1 << 30  # read before each candidate on a GPU: L2 is cold, and clean (what is written there must leave)
AHEAD = 3_000_000  # cycles that the GPU then sleeps, so that launches queue up: the host is not what is timed
Samples = dict[str, list[float]]  # seconds in each round, by phase


@dataclass
class Candidate:
    """``forward`` returns tensors to differentiate, with their upstream gradients; or nothing, and is all there is."""

    forward: Callable[[], list[Tensor] | None]
    upstream: list[Tensor | None] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)  # whose .grad is cleared before each round

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


class Clock(Protocol):
    def lap(self, candidate: Candidate) -> tuple[float, ...]:
        """Run a candidate once; return the seconds of forward, and of backward if it has one."""


def backward(outputs: list[Tensor], candidate: Candidate) -> None:
    torch.autograd.backward(outputs, candidate.upstream)


class WallClock:
    """Time on the host. On a GPU that is the cost of launching, what is launched being waited for outside it."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def lap(self, candidate: Candidate) -> tuple[float, ...]:
        candidate.clear()
        self.wait()
        start = time.perf_counter()
        outputs = candidate.forward()
        middle = time.perf_counter()
        if outputs is None:
            self.wait()
            return (middle - start,)
        backward(outputs, candidate)
        end = time.perf_counter()
        self.wait()
        return middle - start, end - middle


class EventClock:
    """Time on a GPU between events, L2 cold."""

    def __init__(self) -> None:
        self.flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        self.sum = torch.zeros((), device="cuda")

    def lap(self, candidate: Candidate) -> tuple[float, ...]:
        candidate.clear()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.sum(self.flush, 0, out=self.sum)
        torch.cuda._sleep(AHEAD)
        events[0].record()
        outputs = candidate.forward()
        events[1].record()
        if outputs is not None:
            backward(outputs, candidate)
            events[2].record()
        torch.cuda.synchronize()
        laps = (events[0].elapsed_time(events[1]),)
        return tuple(1e-3 * ms for ms in (laps if outputs is None else (*laps, events[1].elapsed_time(events[2]))))


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

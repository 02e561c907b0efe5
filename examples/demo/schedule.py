"""Which split begins when: at least so many, at most so many, and in between as many as fit into the time."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from .learning import METHODS
from .options import FEWEST, MOST

COMPARED = ("none", "bn", "vcl")  # on every split; VCL for modes on the first few


def methods_of(split: int) -> tuple[str, ...]:
    """Return the methods that learn a split."""
    return tuple(METHODS) if split < FEWEST else COMPARED


@dataclass
class Schedule:
    """The time a training takes is measured on those that have ended.

    Args:
        splits: begin exactly so many; None: ``FEWEST`` to ``MOST``.
        at_a_time: trainings.
    """

    splits: int | None
    at_a_time: int
    begun: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def most(self) -> int:
        """Return the number of splits that are begun if there is time."""
        return self.splits or MOST

    def begins(self, left: float) -> bool:
        """Return whether one more split begins with ``left`` seconds left, when a worker is free."""
        if self.begun >= self.most:
            return False
        if self.splits or self.begun < FEWEST or not self.seconds:  # no training has ended: there are cores to spare
            return True
        rounds = (len(COMPARED) + self.at_a_time - 1) / self.at_a_time
        return rounds * statistics.mean(self.seconds) <= left

    def trainings(self, left: float) -> int:
        """Return how many trainings there will be, as it looks now."""
        return sum(len(methods_of(split)) for split in range(self.expected(left)))

    def expected(self, left: float) -> int:
        """Return how many splits there will be, as it looks now; ``most`` before a training has ended."""
        if self.splits or not self.seconds:
            return self.most
        fit = math.floor(left * self.at_a_time / (len(COMPARED) * statistics.mean(self.seconds)))
        return min(self.most, max(FEWEST, self.begun + max(0, fit)))

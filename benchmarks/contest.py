"""A contest: candidates for one job on one input, raced, with what is known of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .memory import saved_bytes
from .race import PHASES, Candidate, Clock, Samples, race


@dataclass
class Contest:
    """``factories`` make the candidates; ``whole`` names those that run as one, without a backward of their own."""

    name: str
    factories: dict[str, Callable[[], Candidate]]
    clock: Callable[[], Clock]
    whole: frozenset[str] = frozenset()
    floor: Callable[[str, str], int | None] = lambda candidate, phase: None  # bytes that must move
    memory: Callable[[Candidate], int] | None = None  # bytes held for backward; the default counts saved tensors
    seconds: float = 4.0
    least: int = 7
    most: int = 101
    info: dict[str, Any] = field(default_factory=dict)

    def phases(self, candidate: str) -> tuple[str, ...]:
        return ("both",) if candidate in self.whole else PHASES

    def run(self) -> Outcome:
        """Race the candidates; one that raises an error is left out of the race, and its error kept."""
        outcome = Outcome()
        clock, able = self.clock(), {}
        for name, make in self.factories.items():
            try:
                candidate = make()
                clock.lap(candidate)
                if self.memory is not None:
                    outcome.memory[name] = self.memory(candidate)
                elif name not in self.whole:
                    outcome.memory[name] = saved_bytes(candidate.forward, candidate.leaves[1:])
                able[name] = candidate
            except Exception as error:  # out of memory, or not supported here: told by that candidate's test
                outcome.errors[name] = error
        outcome.samples = race(able, clock, self.seconds, self.least, self.most)
        return outcome


@dataclass
class Outcome:
    samples: dict[str, Samples] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)

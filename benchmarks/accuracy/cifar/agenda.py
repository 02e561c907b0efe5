"""Which runs are wanted, which of them can run here, how long they take."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from fnmatch import fnmatch

from . import machine
from .files import Store
from .records import epochs_of, progress
from .runs import Run, planned
from .training import CPU


class Agenda:
    """The runs of the plan whose names match ``patterns``, in the order of the first pattern that does."""

    def __init__(self, store: Store, patterns: list[str], *, quick: bool = False) -> None:
        self.store, self.patterns, self.quick = store, patterns, quick
        self.here = machine.describe(CPU, machine.dtype(CPU))

    def plan(self) -> list[Run]:
        """Return every run, with the learning rates chosen so far."""
        return list(planned(self.store.rates(), quick=self.quick))

    def wanted(self) -> list[Run]:
        """Return the runs that match."""
        plan = self.plan()
        return list({run.name: run for pattern in self.patterns for run in plan if fnmatch(run.name, pattern)}.values())

    def possible(self) -> list[Run]:
        """Return what can run here and is not finished: first what is begun."""
        waiting = self.waiting()
        todo = [run for run in self.wanted() if run.name not in waiting and not self.store.finished(run)]
        return sorted(todo, key=lambda run: self.store.record(run) is None)

    def waiting(self) -> dict[str, str]:
        """Return the runs that cannot run here now, each with the reason.

        The methods of a seed are compared with each other, so all of them run on one kind of CPU and in one dtype.
        """
        homes: dict[tuple[str, float | None, int], dict[str, str]] = {}
        for run in self.plan():
            record = self.store.record(run)
            if record is not None:
                homes.setdefault((run.dataset, run.held_out, run.seed), record["machine"])
        reasons = {}
        for run in self.wanted():
            home = homes.get((run.dataset, run.held_out, run.seed), self.here)
            if self.store.finished(run):
                continue
            if run.learning_rate is None:
                reasons[run.name] = "waits for stage 0 to choose its learning rate"
            elif home != self.here:
                reasons[run.name] = (
                    f"waits for {home['kind']} ({home['dtype']}), where its seed began; here is {self.here['kind']} "
                    f"({self.here['dtype']}): PLAN.md says when a seed begins again"
                )
        return reasons

    def hours_left(self, workers: int) -> str:
        """Return how long the workers need for what can run here or waits for stage 0.

        By the CPU time of past epochs; a method not yet seen takes the mean of the others.
        """
        waiting = self.waiting()
        runs = [run for run in self.wanted() if run.learning_rate is None or run.name not in waiting]
        records = {run.name: record for run in runs if (record := self.store.record(run)) is not None}
        times: dict[str, list[float]] = {}
        for run in runs:
            if run.name in records:
                times.setdefault(run.method, []).extend(records[run.name]["epochs"]["cpu_seconds"])
        medians = {method: statistics.median(column) for method, column in times.items() if column}
        left = [
            (run.method, run.epochs - (epochs_of(records[run.name]) if run.name in records else 0))
            for run in runs
            if not self.store.finished(run)
        ]
        if left and not medians:
            return "hours left: not known before the first epoch"
        usual = statistics.mean(medians.values()) if medians else 0.0
        seconds = sum(epochs * medians.get(method, usual) for method, epochs in left)
        return f"{seconds / workers / 3600:.1f} hours left"

    def status(self, workers: int) -> Iterator[str]:
        """Yield a line for each run that is finished or begun, and one on the rest."""
        runs, reasons = self.wanted(), self.waiting()
        finished = begun = 0
        for run in runs:
            record = self.store.record(run)
            if record is not None:
                ended = self.store.finished(run)
                yield f"{progress(run, record)}, {'finished' if ended else reasons.get(run.name, 'begun')}"
                finished += ended
                begun += not ended
        todo = len(runs) - finished - begun
        yield f"{finished} finished, {begun} begun, {todo} to do; {self.hours_left(workers)}"

"""What the queue has before it: which runs are wanted, which can be worked on here, how long they take."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from fnmatch import fnmatch

from . import machine
from .files import Store
from .runs import Run, planned
from .training import CPU, Record


class Agenda:
    """The runs of the plan whose names match ``patterns``, in the order of the first pattern that does."""

    def __init__(self, store: Store, patterns: list[str], *, quick: bool = False) -> None:
        self.store, self.patterns, self.quick = store, patterns, quick
        self.here = machine.describe(CPU)

    def plan(self) -> list[Run]:
        """Return every run, with the learning rates chosen so far."""
        return list(planned(self.store.rates(), quick=self.quick))

    def wanted(self) -> list[Run]:
        """Return the runs that match."""
        runs = self.plan()
        return list({run.name: run for pattern in self.patterns for run in runs if fnmatch(run.name, pattern)}.values())

    def possible(self) -> list[Run]:
        """Return what can be worked on here: runs that are begun, then others."""
        waiting = {run.name for run, _ in self.held_up()}
        todo = [run for run in self.wanted() if run.name not in waiting and not self.store.finished(run)]
        return sorted(todo, key=lambda run: self.store.record(run) is None)

    def held_up(self) -> Iterator[tuple[Run, str]]:
        """Yield the runs that cannot be worked on here, and why.

        The methods of a seed are compared with each other, so all of them run on one kind of CPU and in one dtype.
        """
        homes: dict[tuple[str, float | None, int], dict[str, str]] = {}
        for run in self.plan():
            record = self.store.record(run)
            if record is not None:
                homes.setdefault((run.dataset, run.held_out, run.seed), record["machine"])
        for run in self.wanted():
            home = homes.get((run.dataset, run.held_out, run.seed), self.here)
            if self.store.finished(run):
                continue
            if run.learning_rate is None:
                yield run, "waits for stage 0 to choose its learning rate"
            elif home != self.here:
                where = f"{home['kind']} ({home['dtype']})"
                yield (
                    run,
                    f"waits for {where}, where its seed began; here is {self.here['kind']} ({self.here['dtype']})",
                )

    def hours_left(self, workers: int) -> str:
        """Return how long the workers still need, by the CPU time of past epochs; an unseen method takes the mean."""
        runs = self.wanted()
        records = {run.name: record for run in runs if (record := self.store.record(run)) is not None}
        times: dict[str, list[float]] = {}
        for run in runs:
            if run.name in records:
                times.setdefault(run.method, []).extend(records[run.name]["epochs"]["cpu_seconds"])
        medians = {method: statistics.median(of) for method, of in times.items() if of}
        if not medians:
            return "hours left: not known before the first epoch"
        usual = statistics.mean(medians.values())
        seconds = 0.0
        for run in runs:
            if not self.store.finished(run):
                done = epochs_of(records[run.name]) if run.name in records else 0
                seconds += (run.epochs - done) * medians.get(run.method, usual)
        return f"{seconds / workers / 3600:.1f} hours left"

    def status(self, workers: int) -> Iterator[str]:
        """Yield a line for each run that is finished or begun, and one on the rest."""
        runs = self.wanted()
        reasons = {run.name: reason for run, reason in self.held_up()}
        finished = begun = 0
        for run in runs:
            record = self.store.record(run)
            if record is not None:
                whole = self.store.finished(run)
                yield f"{progress(run, record)}, {'finished' if whole else reasons.get(run.name, 'begun')}"
                finished += whole
                begun += not whole
        todo = len(runs) - finished - begun
        yield f"{finished} finished, {begun} begun, {todo} to do; {self.hours_left(workers)}"


def epochs_of(record: Record) -> int:
    """Return how many epochs are done."""
    return len(record["epochs"]["test_error"])


def progress(run: Run, record: Record) -> str:
    """Return where a run is that is begun or finished."""
    done, epochs = epochs_of(record), record["epochs"]
    if not done:
        return f"{run.name}: epoch 0 of {run.epochs}"
    state = "diverged" if record["diverged"] else f"error {epochs['test_error'][-1]:.2f} %"
    return f"{run.name}: epoch {done} of {run.epochs}, {state}, {epochs['cpu_seconds'][-1]:.0f} s an epoch"

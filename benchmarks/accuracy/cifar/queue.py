"""The runs of the plan, one after another, on a machine that may stop at any time.

A finished run has its record under the results; a begun one its checkpoint in the state folder. So the same command
goes on where the last one stopped, whatever ended it.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import signal
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.console import Console

from ...demo import data as datasets
from ...demo.errors import DataError
from ..work import begin
from . import machine
from .files import Store
from .runs import Run, planned
from .training import Stopped, Training

POLL = 0.5  # seconds between two looks at the workers
LEAST_PRIORITY = 19
KEEP_MEMORY = {  # glibc gives large blocks back, and to fault them in again costs more than many a kernel
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
CPU = torch.device("cpu")


def run(options: argparse.Namespace, console: Console) -> None:
    """Work until nothing is left that can be done here, or until SIGINT or SIGTERM.

    Raises:
        DataError: the data is missing, or a run failed.
    """
    store = Store(options.results, options.state)
    if options.status:
        return status(store, options.runs, options.workers, console)
    if options.data_dir is None:
        raise DataError("cifar wants --data-dir FOLDER, where the data is")
    with only_one(options.state):
        Queue(store, options).work(console)


class Queue:
    """Workers, each with one run."""

    def __init__(self, store: Store, options: argparse.Namespace) -> None:
        self.store, self.options = store, options
        self.workers: dict[str, tuple[Run, BaseProcess]] = {}
        self.failed: list[str] = []
        self.told: dict[str, int] = {}  # epochs of which a line was printed

    def work(self, console: Console) -> None:
        os.environ |= KEEP_MEMORY
        with stop_signals() as stop:
            while not stop.is_set():
                self._start()
                if not self.workers:
                    break
                stop.wait(POLL)
                self._follow(console)
            for _, process in self.workers.values():
                process.terminate()
            for _, process in self.workers.values():
                process.join()
            self._follow(console)
        if stop.is_set():
            console.print("stopped; the same command goes on from the last whole epochs", highlight=False)
        for run, reason in held_up(self.store, self.options.runs):
            console.print(f"{run.name} {reason}", highlight=False)
        if self.failed:
            raise DataError(f"{', '.join(self.failed)} failed; see above")

    def _start(self) -> None:
        """Give each idle worker a run."""
        while len(self.workers) < self.options.workers:
            taken = {*self.workers, *self.failed}
            run = next((run for run in possible(self.store, self.options.runs) if run.name not in taken), None)
            if run is None:
                return
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=train, args=(run, self.store, self.options.data_dir), name=run.name)
            process.start()
            self.workers[run.name] = run, process

    def _follow(self, console: Console) -> None:
        """Print what is new of each run; forget the workers that have ended."""
        for run, process in list(self.workers.values()):
            ended = not process.is_alive()
            record = self.store.record(run)
            done = 0 if record is None else len(record["epochs"]["test_error"])
            if record is not None and done > self.told.get(run.name, 0):
                self.told[run.name] = done
                left = hours_left(self.store, self.options.runs, self.options.workers)
                console.print(f"{progress(run, record)}; {left}", highlight=False)
            if ended:
                del self.workers[run.name]
                if process.exitcode not in (0, -signal.SIGTERM):
                    self.failed.append(run.name)


def train(run: Run, store: Store, data_dir: Path) -> None:
    """Work of one process: a run from its last checkpoint to its end, with a checkpoint after each epoch."""
    os.nice(LEAST_PRIORITY)
    begin()
    with stop_signals() as stop:
        data = datasets.load(run.dataset, data_dir, held_out=run.held_out, standardise="pixel", device=CPU)
        training = Training(run, data, dtype=machine.dtype(CPU), device=CPU)
        store.resume(training)
        try:
            while not training.finished:
                training.epoch(stop.is_set)
                store.save(training)
        except Stopped:
            pass


def wanted(store: Store, patterns: list[str]) -> list[Run]:
    """Return the runs of the plan whose names match, in the order of the first pattern that does."""
    runs = list(planned(store.rates()))
    named = {run.name: run for pattern in patterns for run in runs if fnmatch(run.name, pattern)}
    return list(named.values())


def possible(store: Store, patterns: list[str]) -> Iterator[Run]:
    """Yield what can be worked on here: runs that are begun, then others."""
    todo = [run for run in wanted(store, patterns) if not store.finished(run)]
    reasons = {run.name for run, _ in held_up(store, patterns)}
    yield from sorted((run for run in todo if run.name not in reasons), key=lambda run: store.record(run) is None)


def held_up(store: Store, patterns: list[str]) -> Iterator[tuple[Run, str]]:
    """Yield the runs that cannot be worked on here, and why.

    The methods of a seed are compared with each other, so all of them run on one kind of CPU and in one dtype.
    """
    here = {"kind": machine.kind(CPU), "dtype": str(machine.dtype(CPU)).removeprefix("torch.")}
    runs = list(planned(store.rates()))
    homes: dict[tuple[str, int | None, int], dict[str, str]] = {}
    for run in runs:
        record = store.record(run)
        if record is not None:
            homes.setdefault((run.dataset, run.held_out, run.seed), record["machine"])
    for run in wanted(store, patterns):
        home = homes.get((run.dataset, run.held_out, run.seed), here)
        if store.finished(run):
            continue
        if run.learning_rate is None:
            yield run, "waits for stage 0 to choose its learning rate"
        elif home != here:
            yield run, f"waits for {home['kind']}, {home['dtype']}, where its seed began; here is {here['kind']}"


def progress(run: Run, record: dict[str, object]) -> str:
    """Return a line on a run that is begun or finished."""
    epochs: dict[str, list[float]] = record["epochs"]  # type: ignore[assignment]
    error, seconds = epochs["test_error"][-1], epochs["cpu_seconds"][-1]
    state = "diverged" if record["diverged"] else f"error {error:.2f} %"
    return f"{run.name}: epoch {len(epochs['test_error'])} of {run.epochs}, {state}, {seconds:.0f} s an epoch"


def hours_left(store: Store, patterns: list[str], workers: int) -> str:
    """Return how long the workers still need, by the CPU time of past epochs; a method not yet seen takes the mean."""
    runs = wanted(store, patterns)
    records = {run.name: record for run in runs if (record := store.record(run)) is not None}
    times: dict[str, list[float]] = {}
    for run in runs:
        if run.name in records:
            times.setdefault(run.method, []).extend(records[run.name]["epochs"]["cpu_seconds"])
    if not any(times.values()):
        return "hours left: not known before the first epoch"
    medians = {method: statistics.median(of) for method, of in times.items() if of}
    usual = statistics.mean(medians.values())
    seconds = sum(
        (run.epochs - len(records[run.name]["epochs"]["test_error"] if run.name in records else ()))
        * medians.get(run.method, usual)
        for run in runs
        if not store.finished(run)
    )
    return f"{seconds / workers / 3600:.1f} hours left"


def status(store: Store, patterns: list[str], workers: int, console: Console) -> None:
    """Print what is finished, begun, waiting and to do."""
    runs = wanted(store, patterns)
    reasons = {run.name: reason for run, reason in held_up(store, patterns)}
    todo = 0
    for run in runs:
        record = store.record(run)
        if record is not None:
            state = "finished" if store.finished(run) else reasons.get(run.name, "begun")
            console.print(f"{progress(run, record)}, {state}", highlight=False)
        todo += record is None
    finished = sum(store.finished(run) for run in runs)
    begun = len(runs) - finished - todo
    left = hours_left(store, patterns, workers)
    console.print(f"{finished} finished, {begun} begun, {todo} to do; {left}", highlight=False)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Keep a second queue out of the same state folder.

    Raises:
        DataError: one is at work there.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(f"a queue is at work in {state}: process {file.read().strip()}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

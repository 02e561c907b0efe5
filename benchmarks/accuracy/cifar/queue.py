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
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from ...demo import data as datasets
from ...demo.errors import DataError
from ..work import begin
from . import machine
from .agenda import Agenda, epochs_of, progress
from .files import Store
from .runs import Run
from .training import CPU, Stopped, Training

POLL = 1.0  # seconds between two looks at the workers
LEAST_PRIORITY = 19
KEEP_MEMORY = {  # glibc gives large blocks back, and to fault them in again costs more than many a kernel
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}


def run(options: argparse.Namespace, console: Console) -> None:
    """Work until nothing is left that can be done here, or until SIGINT or SIGTERM.

    Raises:
        DataError: the data is missing, another queue is at work, or a run failed.
    """
    store = Store(options.results, options.state)
    agenda = Agenda(store, options.runs, quick=options.quick)
    if options.status:
        for line in agenda.status(options.workers):
            say(console, line)
        return
    if options.data_dir is None:
        raise DataError("cifar wants --data-dir FOLDER, where the data is")
    with only_one(options.state), stop_signals() as stop:
        failed = Queue(agenda, options.data_dir, options.workers, console).work(stop)
        if stop.is_set():
            say(console, "stopped; the same command goes on from the last whole epochs")
        for waiting, reason in agenda.held_up():
            say(console, f"{waiting.name} {reason}")
        if failed:
            raise DataError(f"{', '.join(failed)} failed; see above")


def say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


class Queue:
    """Workers, each a process with one run."""

    def __init__(self, agenda: Agenda, data_dir: Path, workers: int, console: Console) -> None:
        self.agenda, self.data_dir, self.most, self.console = agenda, data_dir, workers, console
        self.workers: dict[str, tuple[Run, BaseProcess]] = {}
        self.told: dict[str, int] = {}  # epochs of each run of which a line was printed

    def work(self, stop: threading.Event) -> list[str]:
        """Do what is possible here; return the names of the runs that failed."""
        os.environ |= KEEP_MEMORY
        failed: list[str] = []
        while not stop.is_set():
            self._start({*self.workers, *failed})
            if not self.workers:
                break
            stop.wait(POLL)
            failed += self._follow()
        for _, process in self.workers.values():
            process.terminate()
        for _, process in self.workers.values():
            process.join()
        return failed + self._follow()

    def _start(self, taken: set[str]) -> None:
        """Give each idle worker a run."""
        idle = self.most - len(self.workers)
        for run in [run for run in self.agenda.possible() if run.name not in taken][:idle] if idle else ():
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=train, args=(run, self.agenda.store, self.data_dir))
            process.start()
            self.workers[run.name] = run, process

    def _follow(self) -> list[str]:
        """Print what is new of each run; forget the workers that have ended; return the runs that failed."""
        failed = []
        for run, process in list(self.workers.values()):
            ended = not process.is_alive()
            record = self.agenda.store.record(run)
            if record is not None and epochs_of(record) > self.told.get(run.name, 0):
                self.told[run.name] = epochs_of(record)
                say(self.console, f"{progress(run, record)}; {self.agenda.hours_left(self.most)}")
            if ended:
                del self.workers[run.name]
                if process.exitcode not in (0, -signal.SIGTERM):
                    failed.append(run.name)
        return failed


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
            return
        store.finish(training)


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
            raise DataError(f"process {file.read().strip()} is at work in {state}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

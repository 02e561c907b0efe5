"""The runs of the plan, one after another, on a machine that may stop at any time.

A finished run has its record in the results; a begun one its checkpoint in the state folder. So the same command
continues where the last one stopped, whatever ended it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from examples.demo.work import be_a_worker

from .. import data as datasets
from ..errors import DataError
from . import machine
from .agenda import Agenda
from .files import Store
from .process import Stop, only_one, say, stop_signals, take_lowest_priority
from .records import epochs_of, progress
from .runs import Run
from .training import CPU, Stopped, Training

POLL = 0.2  # seconds between two looks at the workers
# glibc returns large blocks to the system; faulting them in again costs more than many kernels
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


def run(options: argparse.Namespace, console: Console) -> None:
    """Work until nothing is left that can be done here, or until SIGINT or SIGTERM.

    Raises:
        DataError: data is missing, another queue is at work, or a run failed.
    """
    agenda = Agenda(Store(options.results, options.state), options.runs, quick=options.quick)
    if options.status:
        for line in agenda.status(options.workers):
            say(console, line)
        return
    for dataset in {wanted.dataset for wanted in agenda.possible()}:
        datasets.check_present(dataset, options.data_dir)
    with only_one(options.state), stop_signals() as stop:
        failed = Queue(agenda, options.data_dir, options.workers, console).work(stop)
    if stop.asked:
        say(console, "stopped; the same command continues from the last whole epochs")
    else:
        for name, reason in agenda.waiting().items():
            say(console, f"{name} {reason}")
        if failed:
            raise DataError(f"{', '.join(failed)} failed; see above")


class Queue:
    """Workers, each a process with one run."""

    def __init__(self, agenda: Agenda, data_dir: Path, workers: int, console: Console) -> None:
        self.agenda, self.data_dir, self.most, self.console = agenda, data_dir, workers, console
        self.workers: dict[str, tuple[Run, BaseProcess]] = {}
        self.told: dict[str, int] = {}  # epochs of each run of which a line was printed

    def work(self, stop: Stop) -> list[str]:
        """Do what is possible here; return the names of the runs that failed."""
        os.environ |= KEEP_MEMORY
        failed: list[str] = []
        at_work: set[str] | None = None
        try:
            while not stop.asked:
                if self.workers.keys() != at_work:  # what can run changes only when a run ends
                    self._start({*self.workers, *failed})
                    at_work = set(self.workers)
                if not self.workers:
                    break
                time.sleep(POLL)
                failed += self._follow()
        finally:  # whatever happens, no worker outlives the lock on the folder
            for _, process in self.workers.values():
                process.terminate()
            for _, process in self.workers.values():
                process.join()
        self._follow()
        return failed

    def _start(self, taken: set[str]) -> None:
        """Give each idle worker a run."""
        idle = self.most - len(self.workers)
        for run in [run for run in self.agenda.possible() if run.name not in taken][:idle] if idle else ():
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=train, args=(run, self.agenda.store, self.data_dir, self.agenda.quick))
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


def train(run: Run, store: Store, data_dir: Path, quick: bool) -> None:
    """Work of one process: a run from its last checkpoint to its end, with a checkpoint after each epoch."""
    if not quick:  # a check has somebody waiting for it
        take_lowest_priority()
    be_a_worker()
    with stop_signals() as stop:
        data = datasets.load(run.dataset, data_dir, held_out=run.held_out, standardise="pixel", device=CPU)
        training = Training(run, data, dtype=machine.dtype(CPU), device=CPU)
        store.resume(training)
        try:
            while not training.finished:
                training.epoch(lambda: stop.asked)
                store.save(training)
        except Stopped:
            return
        store.publish(training)

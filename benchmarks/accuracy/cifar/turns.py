"""The three methods on one GPU, an epoch each in turn, so that whatever ends the command they can be compared.

The paper's width (k = 1) and 160 epochs; data and augmentation are on the device. Records and checkpoints are written
after each epoch, so the same command continues whatever ended it: its budget, a signal, or an error.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from time import monotonic

import torch
from rich.console import Console

from .. import data as datasets
from ..errors import DataError
from . import machine
from .files import Store
from .process import only_one, say, stop_signals
from .records import epochs_of, progress
from .runs import BASE, Run
from .training import Training

RATE = 0.05  # the authors'
RESERVE = 2.0  # epochs' time that is kept back, for one more and for what is written


def run(options: argparse.Namespace, console: Console) -> None:
    """Train seed after seed until the budget is used.

    Raises:
        DataError: the data, or the device, is missing, or another command is at work.
    """
    until = monotonic() + options.budget
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {options.device}: torch sees no CUDA device (--device cpu rehearses)")
    torch.backends.cudnn.benchmark = True
    store = Store(options.results, options.state)
    lasted = last_epochs(store, options)
    with only_one(options.state), stop_signals() as stop:

        def over(epochs: float) -> bool:
            """Whether no time is left for that many epochs of the slowest method."""
            return stop.asked or monotonic() + epochs * max(lasted.values(), default=0) > until

        data = datasets.load(options.dataset, options.data_dir, standardise="pixel", device=device)
        for seed in range(options.seeds):
            runs = [run for run in methods(options, seed) if not ended(store, run)]
            trainings = [Training(run, data, dtype=machine.dtype(device), device=device) for run in runs]
            for training in trainings:
                store.resume(training)
            if over(sum(training.run.epochs - training.done for training in trainings) if seed else 0):
                break  # a part of another seed would lack the end of its schedule, where the error falls most
            while (waiting := [training for training in trainings if not training.finished]) and not over(RESERVE):
                training = min(waiting, key=lambda training: training.done)
                began = monotonic()
                training.epoch()
                lasted[training.run.method] = monotonic() - began
                store.save(training)
                store.publish(training)
            for training in trainings:
                say(console, progress(training.run, training.record))


def methods(options: argparse.Namespace, seed: int) -> list[Run]:
    """Return the runs of a seed."""
    return [Run("gpu", options.dataset, method, seed, RATE, options.epochs, options.k) for method in BASE]


def ended(store: Store, run: Run) -> bool:
    """Whether the results have every epoch of this very run: those of one that is not finished are there too."""
    record = store.record(run)
    if record is None or record["run"] != asdict(run):
        return False
    return record["diverged"] or epochs_of(record) == run.epochs


def last_epochs(store: Store, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each method's latest epoch, from records of the first seed.

    Not of its first one, which compiles kernels.
    """
    records = {run.method: record for run in methods(options, 0) if (record := store.record(run)) is not None}
    return {method: record["epochs"]["cpu_seconds"][-1] for method, record in records.items() if epochs_of(record) > 1}

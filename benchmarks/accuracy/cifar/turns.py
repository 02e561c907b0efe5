"""The three methods on one GPU, an epoch each in turn, so that whatever ends the command they can be compared.

The paper's width (k = 1) and 160 epochs; data and augmentation are on the device. Records are written after each epoch,
checkpoints when the command ends: because its budget is used, or by a signal. The same command continues.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console

from ...demo import data as datasets
from ...demo.errors import DataError
from . import machine
from .agenda import epochs_of, progress
from .files import Store
from .queue import only_one, say, stop_signals
from .runs import BASE, Run
from .training import Training

RATE = 0.05  # the authors'
RESERVE = 2.0  # epochs' time that is kept back, for one more and for the checkpoints


def run(options: argparse.Namespace, console: Console) -> None:
    """Train seed after seed until the budget is used.

    Raises:
        DataError: the data, or the device, is missing.
    """
    until = time.monotonic() + options.budget
    if options.data_dir is None:
        raise DataError("cifar-gpu wants --data-dir FOLDER, where the data is")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"--device {options.device}: torch sees no CUDA device (--device cpu rehearses)")
    torch.backends.cudnn.benchmark = True
    store = Store(options.results, options.state)
    lasted: dict[str, float] = {}  # seconds of each method's latest epoch; the first one compiles kernels
    with only_one(options.state), stop_signals() as stop:

        def over(epochs: float) -> bool:
            """Whether there is no time left for ``epochs`` of the slowest method."""
            return stop.is_set() or time.monotonic() + epochs * max(lasted.values(), default=0) > until

        data = datasets.load(options.dataset, options.data_dir, standardise="pixel", device=device)
        for seed in range(options.seeds):
            runs = [of for of in methods(options, seed) if not whole(store, of)]
            trainings = [Training(of, data, dtype=machine.dtype(device), device=device) for of in runs]
            for training in trainings:
                store.resume(training)
            if over(sum(training.run.epochs - training.done for training in trainings) if seed else 0):
                break  # a part of another seed would lack the end of its schedule, where the error falls most
            while (waiting := [training for training in trainings if not training.finished]) and not over(RESERVE):
                training = min(waiting, key=lambda training: training.done)
                began = time.monotonic()
                training.epoch()
                lasted[training.run.method] = time.monotonic() - began
                store.finish(training)
            for training in trainings:
                store.save(training)
                say(console, progress(training.run, training.record))


def methods(options: argparse.Namespace, seed: int) -> list[Run]:
    """Return the runs of a seed."""
    return [Run("gpu", options.dataset, method, seed, RATE, options.epochs, options.k) for method in BASE]


def whole(store: Store, run: Run) -> bool:
    """Whether the results have all epochs of a run; those of an unfinished one are there too."""
    record = store.record(run)
    return record is not None and (record["diverged"] or epochs_of(record) == run.epochs)

"""Fully connected networks on UCI and KEEL sets: every method with the same trials of a random search."""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from examples.demo.learning import Learner, batches

from . import keel, results
from .methods import ACTIVATIONS, METHODS, VCL, learner, multilayer
from .training import scores
from .work import Record, do

DEPTH, WIDTH, BATCH = 4, 64, 64
LEARNING_RATE, WEIGHT_DECAY, VCL_WEIGHT = (0.01, 0.3), (1e-5, 1e-2), (1e-3, 1e-1)  # log-uniform draws between


def run(options: argparse.Namespace, console: Console) -> None:
    """Do the study; write its results and figures."""
    quick = options.quick
    settings = {
        "splits": options.splits or (1 if quick else 8),
        "trials": options.trials or (1 if quick else 4),
        "steps": options.steps or (50 if quick else 300),
        "sets": options.sets,
    }
    path = options.out / "tabular.jsonl"
    records = do(units(**settings), work, path, console, processes=options.processes, minutes=options.minutes)
    results.write("tabular", whole(records), settings, options.out)


def whole(records: list[Record]) -> list[Record]:
    """Leave out a split of a set that not every method has yet."""
    sizes = Counter((record["set"], record["split"]) for record in records)
    return [r for r in records if sizes[r["set"], r["split"]] == len(METHODS) * len(ACTIVATIONS)]


def units(*, splits: int, trials: int, steps: int, sets: int | None = None) -> list[Record]:
    """One unit: one method on one split of one set. Split by split, so that a part is a study of fewer splits."""
    return [
        {"set": name, "split": split, "activation": activation, "method": method, "trials": trials, "steps": steps}
        for split in range(splits)
        for name in keel.NAMES[:sets]
        for activation in ACTIVATIONS
        for method in METHODS
    ]


def work(unit: Record) -> Record:
    """Search on a quarter of the training rows, then learn from all of them, and test."""
    start = time.perf_counter()
    x, y = _table(unit["set"])
    train, test = keel.split(x, y, unit["split"])
    inner, chosen_by = _inner(y[train], unit["split"])
    classes = int(y.max()) + 1
    searched = _tensors(x, y, train[inner], train[chosen_by])
    trials = [draw(unit, trial) for trial in range(unit["trials"])]
    found = [_score(_learn(unit, drawn, searched, classes), searched) for drawn in trials]
    best = max(range(len(trials)), key=lambda trial: found[trial])
    final = _tensors(x, y, train, test)
    accuracy, nll = scores(_learn(unit, trials[best], final, classes).model, final[2], final[3])
    return {
        "accuracy": accuracy,
        "nll": nll,
        "tested": len(test),
        "chosen": trials[best],
        "validation_accuracy": found[best][0],
        "seconds": round(time.perf_counter() - start, 3),
    }


@lru_cache(2)
def _table(name: str) -> tuple[Any, np.ndarray]:
    return keel.table(name)


def _inner(y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import StratifiedShuffleSplit

    return next(StratifiedShuffleSplit(1, test_size=0.25, random_state=seed).split(y, y))


def _tensors(x: Any, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = keel.features(x, train, test)
    return torch.from_numpy(a), torch.from_numpy(y[train]), torch.from_numpy(b), torch.from_numpy(y[test])


def draw(unit: Record, trial: int) -> Record:
    """The settings of a trial: the same learning rates and decays for every method; VCL has its weight too."""
    random = np.random.default_rng([unit["split"], trial, *unit["set"].encode()])
    ranges = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "weight": VCL_WEIGHT}
    drawn = {name: float(f"{np.exp(random.uniform(*np.log(ends))):.3g}") for name, ends in ranges.items()}
    return drawn if unit["method"] in VCL else {name: drawn[name] for name in ("learning_rate", "weight_decay")}


def _learn(unit: Record, drawn: Record, data: tuple[Tensor, ...], classes: int) -> Learner:
    x, y = data[:2]
    model = multilayer(x.shape[1], classes, unit["method"], unit["activation"], depth=DEPTH, width=WIDTH)
    learnt = learner(model, unit["method"], x[:1], seed=unit["split"], steps=unit["steps"], **drawn)
    order = torch.Generator().manual_seed(unit["split"])
    learnt.model.train()
    todo = unit["steps"]
    while todo:
        for chosen in batches(len(x), BATCH, order)[:todo]:
            learnt.step(x[chosen], y[chosen])
            learnt.schedule.step()
            todo -= 1
    return learnt


def _score(learnt: Learner, data: tuple[Tensor, ...]) -> tuple[float, float]:
    """Accuracy, and for equal ones the lower cross-entropy."""
    accuracy, nll = scores(learnt.model, *data[2:])
    return accuracy, -nll if math.isfinite(nll) else -math.inf

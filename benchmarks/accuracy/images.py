"""Convolutional networks on images: error over seeds, and what a step costs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from examples.demo import measure
from examples.demo.learning import Learner

from . import data, methods, results
from .networks import build
from .training import train
from .work import Record, do

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 10, 100, 0.05, 5e-4


def run(options: argparse.Namespace, console: Console) -> None:
    """Do the study; write ``images-NAME``: a row for each training, with what a step of its method costs."""
    quick = options.quick
    shared = {
        "dataset": "digits" if quick else options.dataset,
        "data_dir": None if options.data_dir is None else str(options.data_dir),
        "images": options.limit or (200 if quick else None),
        "epochs": options.epochs or (1 if quick else EPOCHS),
        "k": 0.02 if quick else options.k,
        "device": options.device,
    }
    batches = options.batch_sizes or [BATCH]
    cases: list[Record] = [
        {**shared, "network": network, "activation": activation, "batch": batch}
        for batch in batches
        for network in options.networks
        for activation in options.activations
        if (network, activation) != ("demo", "relu")
    ]
    units = [
        {**case, "method": method, "seed": seed, "split": data.split_of(case["dataset"], seed)}
        for seed in range(options.seeds or (1 if quick else 5))
        for case in cases
        for method in options.methods
        if not methods.redundant(method, case["batch"])
    ]
    name = f"images-{options.name or shared['dataset']}"
    costs = [{**case, "methods": options.methods, "rounds": 3 if quick else 30} for case in cases]
    measured = do(costs, cost, options.out / f"{name}-cost.jsonl", console, minutes=options.minutes)
    by_method = {(*_case(r), row["method"]): row for r in measured for row in r["costs"]}
    path, arguments = options.out / f"{name}.jsonl", {"processes": options.processes, "minutes": options.minutes}
    records = do(units, work, path, console, **arguments)
    results.write(name, [r | by_method.get((*_case(r), r["method"]), {}) for r in records], vars(options), options.out)


def _case(unit: Record) -> tuple[Any, ...]:
    return unit["network"], unit["activation"], unit["batch"]


@lru_cache(1)
def images(dataset: str, folder: str | None, count: int | None, pad_to: int, device: str, split: int) -> data.Data:
    """The first ``count`` training images, and all for testing, with a border of zeros up to ``pad_to`` pixels."""
    path = None if folder is None else Path(folder)
    whole = data.load(dataset, path, split_seed=split, device=torch.device(device))
    border = 4 * [max(0, pad_to - whole.train_x.shape[-1]) // 2]
    chosen = replace(whole, train_x=whole.train_x[:count], train_y=whole.train_y[:count])
    return replace(chosen, train_x=F.pad(chosen.train_x, border), test_x=F.pad(chosen.test_x, border))


def seen_by(unit: Record) -> data.Data:
    pad_to = 32 if unit["network"] == "elu-11" else 0  # it halves the image five times
    return images(unit["dataset"], unit["data_dir"], unit["images"], pad_to, unit["device"], unit.get("split") or 0)


def learner(unit: Record, seen: data.Data, vcl: dict[str, Any] | None = None) -> Learner:
    """The network and method of ``unit``; ``vcl`` over the method's settings for attach."""
    model = build(unit["network"], seen.train_x[:1], seen.classes, unit["method"], unit["activation"], unit["k"])
    size = min(unit["batch"], len(seen.train_x))
    return methods.learner(
        model.to(seen.train_x.device),
        unit["method"],
        seen.train_x[:1],
        seed=unit["seed"],
        steps=unit["epochs"] * (len(seen.train_x) // size),
        learning_rate=unit.get("learning_rate", LEARNING_RATE),
        weight_decay=WEIGHT_DECAY,
        he=unit.get("he", True),
        **{"unit": "activation", **methods.VCL.get(unit["method"], {}), **(vcl or {})},
    )


def work(unit: Record, vcl: dict[str, Any] | None = None) -> Record:
    """Train once; return the test error in per cent, at the end and the least, and the negative log-likelihood."""
    seen = seen_by(unit)
    learnt = learner(unit, seen, vcl)
    trained = train(learnt, seen, epochs=unit["epochs"], batch_size=unit["batch"], seed=unit["seed"])
    errors = [round(100 * (1 - accuracy), 4) for accuracy in trained.test_accuracy]
    found = {"error": errors[-1], "best_error": min(errors), "train_loss": trained.train_loss[-1]}
    return {**found, "nll": trained.test_nll[-1]}


def cost(unit: Record) -> Record:
    """Median milliseconds of a step and bytes saved for backward, the methods taking turns."""
    seen = seen_by(unit)
    x, y = seen.train_x[: unit["batch"]].clone(), seen.train_y[: unit["batch"]].clone()
    learners = {method: learner({**unit, "method": method, "seed": 0}, seen) for method in unit["methods"]}
    times = measure.step_times(learners, x, y, unit["rounds"])
    return {
        "costs": [
            {
                "method": method,
                "step_ms": times[method]["median_step_ms"],
                "saved_bytes": measure.saved_bytes(partial(learnt.objective, x, y), learnt.model.parameters()),
            }
            for method, learnt in learners.items()
        ]
    }

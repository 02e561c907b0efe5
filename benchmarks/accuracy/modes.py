"""The modes of pre-activations: two Gaussians joined or separated, and a network's layers through training."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from rich.console import Console

import vcl_kernels as vk
from examples.demo import measure
from examples.demo.learning import THIRD_ELU, Settings, build

from . import data, mixture, results
from .training import train
from .work import Record, do

METHODS = ("none", "bn", "vcl")
SHOWN = 500  # test images in a histogram
SEEN = ("step", "layer", "loss", "beta", "beta_least", "variance", "constancy", "kurtosis")  # of a monitor's row


def run(options: argparse.Namespace, console: Console) -> None:
    """Do both parts; write ``mixture`` and ``layers``, and the histograms into ``layers.json``."""
    quick = options.quick
    settings = {"seeds": options.seeds or (4 if quick else 20), "steps": 150 if quick else 1500}
    priors = mixture.PRIORS[::6] if quick else mixture.PRIORS
    mixtures: list[Record] = [
        {"form": form, "prior": prior, **settings} for form in ("relative_variance", "ratio") for prior in priors
    ]
    arguments = {"processes": options.processes, "minutes": options.minutes}
    records = do(mixtures, mixture_work, options.out / "mixture.jsonl", console, **arguments)
    rows = [
        {"form": r["form"], "prior": r["prior"], "unit": unit, "cosine": cosine, "kurtosis": kurtosis}
        for r in records
        for unit, (cosine, kurtosis) in enumerate(zip(r["cosine"], r["kurtosis"], strict=True))
    ]
    results.write("mixture", rows, {**settings, "distance": mixture.DISTANCE}, options.out)

    learning = {"dataset": "digits" if quick else "mnist5k", "images": 500 if quick else 2000}
    learning |= {"epochs": 2 if quick else 10}
    layers: list[Record] = [
        {"method": method, "seed": seed, "split": seed, **learning}
        for seed in range(1 if quick else 5)
        for method in METHODS
    ]
    records = do(layers, layers_work, options.out / "layers.jsonl", console, **arguments)
    rows = [
        {**{name: r[name] for name in ("method", "seed", "split", "nll")}, "test_accuracy": r["accuracy"], **row}
        for r in records
        for row in r["rows"]
    ]
    histograms = {r["method"]: r["histograms"] for r in records if r["seed"] == 0}
    results.write("layers", rows, {**learning, "histograms": histograms}, options.out)


def mixture_work(unit: Record) -> Record:
    return mixture.learn(unit["prior"], unit["form"], unit["seeds"], unit["steps"])


@lru_cache(1)
def images(dataset: str, count: int, split: int) -> data.Data:
    """The first ``count`` training images, and all for testing."""
    whole = data.load(dataset, None, split_seed=split, device=torch.device("cpu"))
    return replace(whole, train_x=whole.train_x[:count], train_y=whole.train_y[:count])


def layers_work(unit: Record) -> Record:
    """Train the demo's network; return the monitor's rows, once an epoch, and histograms of the third ELU's input."""
    seen = images(unit["dataset"], unit["images"], unit["split"])
    batch = 100
    steps = len(seen.train_x) // batch
    settings = Settings(
        steps=unit["epochs"] * steps,
        learning_rate=0.05,
        weight_decay=5e-4,
        vcl={"unit": "channel", "weight": 0.01, "sub_batch_size": 5, "form": "ratio", "beta_mode": "learned"},
    )
    learner = build(unit["method"], seen.train_x[:1], unit["seed"], settings)
    third = learner.model.get_submodule(THIRD_ELU)
    histograms: list[dict[str, Any]] = []

    def look(_: object = None) -> None:
        found = measure.histogram(measure.pre_activations(learner.model, third, seen.test_x[:SHOWN]))
        histograms.append({"density": [round(d, 4) for d in found["density"]], "edges": found["edges"]})

    look()
    with vk.VCLMonitor(learner.model, every=steps, sub_batch_size=5, unit="channel") as monitor:
        trained = train(learner, seen, epochs=unit["epochs"], batch_size=batch, seed=unit["seed"], after=look)
    return {
        "accuracy": trained.test_accuracy[-1],
        "nll": trained.test_nll[-1],
        "rows": [{name: results.rounded(row[name]) for name in SEEN} for row in monitor.rows],
        "histograms": [histograms[0], histograms[len(histograms) // 2], histograms[-1]],
    }

"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .data import DATASETS
from .learner import METHODS


@dataclass(frozen=True)
class Options:
    """What one run of the demo does."""

    dataset: str
    data_dir: Path | None
    methods: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    weight: float
    sub_batch_size: int
    form: str
    device: str
    threads: int
    out: Path
    validate: bool
    quick: bool
    limit: int | None  # training images
    timed_rounds: int


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line; a wrong one exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.description = "Train a small ELU network with no normalisation, batch norm and VCL, and compare."
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="mnist5k")
    add("--data-dir", type=Path, help="folder of fashion-mnist (IDX files) or cifar10, cifar100 (python version)")
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    add("--seeds", type=count, help="runs of each method (3)")
    add("--epochs", type=count, help="(10)")
    add("--batch-size", type=count, default=100)
    add("--learning-rate", type=_positive, default=0.05)
    add("--weight-decay", type=float, default=5e-4)
    add("--weight", type=float, default=0.01, help="of the VCL (%(default)s)")
    add("--sub-batch-size", type=count, default=5, help="samples in a sub-batch of the VCL (%(default)s)")
    add("--form", choices=("ratio", "variance", "relative_variance"), default="ratio")
    add("--device", help="cuda where there is one, else cpu")
    add("--threads", type=count, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder of demo.png and demo.json (%(default)s)")
    add("--validate", action="store_true", help="score on a fifth of the training set, to choose settings by")
    add("--quick", action="store_true", help="one seed, two epochs, 500 images: a check that everything runs")
    given = parser.parse_args(argv)
    if "vcl" in given.methods and given.batch_size < 2 * given.sub_batch_size:
        parser.error(f"--batch-size {given.batch_size} has no two sub-batches of {given.sub_batch_size}")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {given.device}: {str(error).splitlines()[0]}")
    return Options(
        dataset=given.dataset,
        data_dir=given.data_dir,
        methods=tuple(method for method in METHODS if method in given.methods),
        seeds=given.seeds or (1 if given.quick else 3),
        epochs=given.epochs or (2 if given.quick else 10),
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        weight_decay=given.weight_decay,
        weight=given.weight,
        sub_batch_size=given.sub_batch_size,
        form=given.form,
        device=given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=given.threads,
        out=given.out,
        validate=given.validate,
        quick=given.quick,
        limit=500 if given.quick else None,
        timed_rounds=5 if given.quick else 60,
    )


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wants 1 or more, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"wants a number above 0, got {text}")
    return value

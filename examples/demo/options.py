"""The command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .data import SOURCES
from .learning import VCL

FEWEST, MOST = 4, 12  # splits, where --splits does not say
MOST_THREADS = 16


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo")
    parser.description = "Train a small ELU network with no normalisation, batch norm and VCL, and compare."
    add = parser.add_argument
    add("--splits", type=count, help=f"of the images, with their own first weights ({FEWEST} to {MOST}, by the time)")
    add("--minutes", type=above(0), default=2.5, help="no split begins that would end after that (%(default)s)")
    add("--dataset", choices=tuple(SOURCES), default="mnist5k")
    add("--images", type=count, default=1000, help="training images; the others test (%(default)s)")
    add("--epochs", type=count, help="(20)")
    add("--batch-size", type=count, default=20, help="(%(default)s)")
    add("--learning-rate", type=above(0), default=0.05, help="(%(default)s)")
    add("--weight-decay", type=above(0, equal=True), default=5e-4, help="(%(default)s)")
    add("--weight", type=above(0), default=VCL["weight"], help="of the VCL (%(default)s)")
    add("--unit", choices=("channel", "activation"), default=VCL["unit"], help="of the VCL (%(default)s)")
    add("--sub-batch-size", type=count, default=VCL["sub_batch_size"], help="of the VCL (%(default)s)")
    add("--form", choices=("ratio", "variance", "relative_variance"), default=VCL["form"], help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--threads", type=count, default=min(torch.get_num_threads(), MOST_THREADS),
        help="on a CPU: trainings at a time, one thread each (%(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("out"), help="folder of demo.png and demo.json (%(default)s)")
    add("--quick", action="store_true", help="two splits, two epochs, 500 images: a check that everything runs")
    options = parser.parse_args(argv)
    if options.quick:
        options.splits, options.epochs = options.splits or 2, options.epochs or 2
        options.images = min(options.images, 500)
    options.epochs = options.epochs or 20
    options.timed_rounds = 5 if options.quick else 60
    complain(options, parser.error)
    return options


def complain(options: argparse.Namespace, error: Callable[[str], object]) -> None:
    """Call ``error`` with what is wrong with values that are right each by itself."""
    there = SOURCES[options.dataset]
    if not 10 <= options.images <= there - 10:
        error(f"--images {options.images}: {options.dataset} has {there}, and 10 or more are for each part")
    if options.batch_size > options.images:
        error(f"--batch-size {options.batch_size} is more than the {options.images} training images")
    if options.batch_size < 2 * options.sub_batch_size:
        error(f"--batch-size {options.batch_size} has no two sub-batches of {options.sub_batch_size}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as problem:
        error(f"--device {options.device}: {str(problem).splitlines()[0]}")


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants 1 or more, got {text}")
    return int(text)


def above(least: float, *, equal: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and (value > least or (equal and value == least))):
            raise argparse.ArgumentTypeError(f"wants {'at least' if equal else 'more than'} {least:g}, got {text}")
        return value

    return number

"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .data import DATASETS
from .methods import ACTIVATIONS, IMAGE_DEFAULT, IMAGE_METHODS

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
STATE = Path("out/cifar")
SEEDS = {"sensitivity": 10, "segmentation": 5, "modes": 20}
PAGE = Path(__file__).parents[2] / "docs" / "findings.md"


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wants 1 or more, got {text}")
    return value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.description = "Measure what VCL does to accuracy, beside no normalisation, batch norm and layer norm."
    studies = parser.add_subparsers(dest="study", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, default=Path("out/accuracy"), help="folder of the results (%(default)s)")
    shared.add_argument("--quick", action="store_true", help="a small form of the study: a check that everything runs")
    shared.add_argument("--processes", type=count, default=1, help="units of work at a time, one thread each")
    shared.add_argument("--minutes", type=float, help="begin nothing after that; the same command continues")

    add = studies.add_parser(
        "tabular", parents=[shared], help="fully connected networks on UCI and KEEL sets"
    ).add_argument
    add("--splits", type=count, help="of each set into training and test rows (8)")
    add("--trials", type=count, help="of the search for settings (4)")
    add("--steps", type=count, help="of each training (300)")
    add("--sets", type=count, help="only the so many smallest")

    add = studies.add_parser("images", parents=[shared], help="convolutional networks on images").add_argument
    add("--dataset", choices=DATASETS, default="mnist5k")
    add("--data-dir", type=Path, help="folder of fashion-mnist (IDX files) or cifar10, cifar100 (python version)")
    add("--networks", nargs="+", default=["elu-11", "resnet"], choices=("elu-11", "resnet", "demo", "multilayer"))
    add("--activations", nargs="+", default=list(ACTIVATIONS), choices=tuple(ACTIVATIONS))
    add("--methods", nargs="+", default=list(IMAGE_DEFAULT), choices=tuple(IMAGE_METHODS))
    add("--batch-sizes", nargs="+", type=count, help="(100)")
    add("--seeds", type=count, help="(5)")
    add("--epochs", type=count, help="(10)")
    add("--k", type=float, default=0.1, help="width of the 11-layer network; the paper's is 1 or 2 (%(default)s)")
    add("--limit", type=count, help="training images")
    add("--device", default="cpu")
    add("--name", help="of the results, images-NAME (that of the data set)")

    add = studies.add_parser(
        "cifar", help="the runs of PLAN.md, in a queue that can be stopped at any time"
    ).add_argument
    add("--data-dir", type=Path, help="folder of the data: python batches, or the packed parts")
    add(
        "--runs", nargs="+", default=["0-*", "1-*", "1b-*", "2-*"], help="patterns of names, the first ones first (all)"
    )
    add(
        "--workers", type=count, default=2, help="runs at a time, one thread each, at the lowest priority (%(default)s)"
    )
    add("--state", type=Path, help=f"folder of checkpoints ({STATE})")
    add("--results", type=Path, help=f"folder of finished runs ({RESULTS / 'cifar'})")
    add("--quick", action="store_true", help="tiny networks and few epochs: a check that everything runs")
    add("--status", action="store_true", help="say what is done and begun, and how long the rest takes; do nothing")

    add = studies.add_parser("cifar-gpu", help="the paper's width and length on one GPU, methods in turn").add_argument
    add("--dataset", choices=("cifar10", "cifar100"), default="cifar10")
    add("--data-dir", type=Path, help="folder of the data: python batches, or the packed parts")
    add("--budget", type=float, required=True, help="seconds, from the start of the command to its end")
    add("--seeds", type=count, default=8, help="(%(default)s)")
    add("--epochs", type=count, default=160, help="(%(default)s)")
    add("--k", type=float, default=1.0, help="width (%(default)s)")
    add("--device", default="cuda", help="(%(default)s)")
    add("--state", type=Path, help="folder of checkpoints (out/cifar-gpu)")
    add("--results", type=Path, help=f"folder of records ({RESULTS / 'cifar-gpu'})")

    add = studies.add_parser(
        "defaults", parents=[shared], help="which settings attach should have: PLAN-defaults.md"
    ).add_argument
    add("--seeds", type=count, help="of phase 2, at most (as planned)")

    studies.add_parser(
        "scale", parents=[shared], help="which variance the loss asks for; layers that learn by it alone"
    )

    for name, text in (
        ("sensitivity", "to n, weight, form, unit, sub-batches and the learning of beta"),
        ("segmentation", "a label for each pixel, in batches of 4 and 20"),
        ("modes", "two Gaussians through a linear unit; pre-activations through training"),
    ):
        add = studies.add_parser(name, parents=[shared], help=text).add_argument
        add("--seeds", type=count, help=f"({SEEDS[name]})")

    add = studies.add_parser("report", help="the page of findings from the committed results").add_argument
    add("--results", type=Path, default=RESULTS, help="(%(default)s)")
    add("--page", type=Path, default=PAGE, help="(%(default)s)")
    options = parser.parse_args(argv)
    if options.study == "cifar-gpu":
        rehearsal = not options.device.startswith("cuda")  # what it finds is not for the results
        options.state = options.state or STATE.with_name("cifar-gpu-rehearsal" if rehearsal else "cifar-gpu")
        options.results = options.results or (options.state / "results" if rehearsal else RESULTS / "cifar-gpu")
    if options.study == "cifar":
        home = STATE.with_name("cifar-quick") if options.quick else STATE
        options.state = options.state or home
        options.results = options.results or (home / "results" if options.quick else RESULTS / "cifar")
    return options

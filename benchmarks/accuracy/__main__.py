"""Run one study, or render the page of findings."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence

import torch
from rich.console import Console

from .errors import DataError
from .options import parse

# Where a study is that is not a module of its name; each is imported when it runs, with what only it needs
STUDIES = {"cifar": ".cifar.queue", "cifar-gpu": ".cifar.turns", "defaults": ".defaults.study", "scale": ".scale.study"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    options: argparse.Namespace = parse(argv)
    torch.set_num_threads(1)
    study = importlib.import_module(STUDIES.get(options.study, f".{options.study}"), __package__)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found unknown categories")  # test rows may have new names
            study.run(options, Console())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

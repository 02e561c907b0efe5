"""Train, measure, print the table, write the picture and the record."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from . import data as datasets
from . import picture, report
from .compare import compare
from .errors import DataError
from .options import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    try:
        held_out = datasets.TESTED if options.validate else None
        data = datasets.load(options.dataset, options.data_dir, held_out=held_out, limit=options.limit, device=device)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    start = time.perf_counter()
    results = compare(options, data, console)
    seconds = time.perf_counter() - start

    scored_on = "validation" if options.validate else "test"
    title = f"{options.dataset}: {len(data.train_x):,} training images, {len(data.test_x):,} {scored_on} images"
    options.out.mkdir(parents=True, exist_ok=True)
    drawing, record = options.out / "demo.png", options.out / "demo.json"
    picture.draw(results, title, scored_on, drawing)
    report.write(
        {
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
            "versions": report.versions(),
            "machine": report.machine(device),
            "data": {"train": len(data.train_x), scored_on: len(data.test_x), "image": list(data.train_x.shape[1:])},
            "seconds": seconds,
            "methods": results,
        },
        record,
    )
    console.print(report.table(results, title, scored_on))
    print(f"{seconds:.0f} s; wrote {drawing} and {record}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Words for the reader: progress, the table, and the record as JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import vcl_kernels as vk

from .learner import METHODS

Advance = Callable[[str, str], None]  # what is being done, and what to print once when it is finished


@contextmanager
def progress(console: Console, total: int, of: str = "epochs") -> Iterator[Advance]:
    """Count epochs, or other parts of the work: a bar on a terminal, else one line for each finished run."""
    if not console.is_terminal:
        yield lambda doing, finished: print(finished, flush=True) if finished else None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(f"{of},")
    with Progress(*columns, TimeRemainingColumn(compact=True), TextColumn("left"), console=console) as bar:
        task = bar.add_task("", total=total)

        def advance(doing: str, finished: str) -> None:
            bar.update(task, advance=1, description=doing)
            if finished:
                bar.console.print(finished, highlight=False)

        yield advance


def table(results: dict[str, dict[str, Any]], title: str, scored_on: str) -> Table:
    """Return one row for each method."""
    found = Table(title=title, title_justify="left", title_style="bold")
    found.add_column("method")
    for heading in (f"{scored_on} accuracy, %", "step, ms", "saved for backward, MB"):
        found.add_column(heading, justify="right")
    for method, result in results.items():
        final = [100 * curve[-1] for curve in result["test_accuracy"]]
        spread = f" ± {statistics.stdev(final):.2f}" if len(final) > 1 else ""
        found.add_row(
            METHODS[method],
            f"{statistics.mean(final):.2f}{spread}",
            f"{result['median_step_ms']:.2f}",
            f"{result['saved_bytes'] / 1e6:.2f}",
        )
    return found


def versions() -> dict[str, str]:
    """Return what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class is none that torch.load(weights_only=True) takes
        "vcl_kernels": vk.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the times depend on."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"system": platform.system(), "architecture": platform.machine(), "accelerator": accelerator}


def write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(strict(record), indent=1, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """Return ``value`` with None for what JSON has no number for: a loss that diverged."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

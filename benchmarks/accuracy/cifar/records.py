"""What is kept of a run: settings, machine, a column for each metric with an entry for each epoch, the layers."""

from __future__ import annotations

import json
from typing import Any

from examples.demo.record import strict

from .runs import Run

Record = dict[str, Any]
COLUMNS = ("test_error", "test_nll", "train_loss", "vcl_loss", "learning_rate", "cpu_seconds")
DIGITS = 6


def epochs_of(record: Record) -> int:
    """Return how many epochs are done."""
    return len(record["epochs"]["test_error"])


def score(record: Record) -> tuple[float, float]:
    """Return error and negative log-likelihood after the last epoch; infinite if the run diverged."""
    error, nll = (record["epochs"][name][-1] for name in ("test_error", "test_nll"))
    return (float("inf"), float("inf")) if record["diverged"] else (error, nll)


def progress(run: Run, record: Record) -> str:
    """Return a line that says how far a run is."""
    done, epochs = epochs_of(record), record["epochs"]
    if not done:
        return f"{run.name}: epoch 0 of {run.epochs}"
    state = "diverged" if record["diverged"] else f"error {epochs['test_error'][-1]:.2f} %"
    return f"{run.name}: epoch {done} of {run.epochs}, {state}, {epochs['cpu_seconds'][-1]:.0f} s an epoch"


def text(record: Record) -> str:
    """Return the record as JSON that a person can read: a line for each column, and for each look at the layers."""
    entries = [f" {json.dumps(key)}: {_value(value)}" for key, value in record.items()]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _value(value: Any) -> str:
    if isinstance(value, dict) and any(isinstance(column, list) for column in value.values()):
        inner = [f"  {json.dumps(key)}: {_line(column)}" for key, column in value.items()]
        return "{\n" + ",\n".join(inner) + "\n }"
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return "[\n" + ",\n".join(f"  {_line(entry)}" for entry in value) + "\n ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(strict(_rounded(value)), allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

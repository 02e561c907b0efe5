"""What is on disk: checkpoints of runs that are begun, in an ignored folder, and records of those that are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ...demo.report import strict
from .runs import Rates, Run, chosen
from .training import Record, Training

DIGITS = 6


def replace_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that under its name is at any time all of the old or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Store:
    """``results`` has ``NAME.json`` of each finished run, ``state`` a folder NAME with its checkpoint and record."""

    def __init__(self, results: Path, state: Path) -> None:
        self.results, self.state = results, state

    def save(self, training: Training) -> None:
        """Write the checkpoint, and the record beside it."""
        folder = self.state / training.run.name
        replace_whole(folder / "checkpoint.pt", lambda file: torch.save(training.state(), file))
        replace_whole(folder / "record.json", lambda file: file.write(lines(training.record).encode()))

    def finish(self, training: Training) -> None:
        """Write the record to the results."""
        replace_whole(self._result(training.run), lambda file: file.write(lines(training.record).encode()))

    def resume(self, training: Training) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: it cannot be read, or is of another run.
        """
        path = self.state / training.run.name / "checkpoint.pt"
        if not path.exists():
            return
        try:
            training.load(torch.load(path, map_location=training.device, weights_only=True))
        except Exception as error:
            raise ValueError(f"{path} cannot be resumed; delete its folder to begin the run again: {error}") from error

    def record(self, run: Run) -> Record | None:
        """Return the record of a run that is finished or begun; None of another."""
        for path in (self._result(run), self.state / run.name / "record.json"):
            if path.exists():
                found: Record = json.loads(path.read_text())
                return found
        return None

    def finished(self, run: Run) -> bool:
        return self._result(run).exists()

    def _result(self, run: Run) -> Path:
        return self.results / f"{run.name}.json"

    def rates(self) -> Rates:
        """Return the learning rates that stage 0 has chosen so far."""
        records = [json.loads(path.read_text()) for path in sorted(self.results.glob("0-*.json"))]
        return chosen({Run(**record["run"]).name: score(record) for record in records})


def score(record: Record) -> tuple[float, float]:
    """Return error and negative log-likelihood after the last epoch; infinite of a run that diverged."""
    error, nll = (record["epochs"][name][-1] for name in ("test_error", "test_nll"))
    return (float("inf"), float("inf")) if record["diverged"] else (error, nll)


def lines(record: Record) -> str:
    """Return JSON with each entry of the outer dicts on a line of its own."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        if isinstance(value, list):
            return [rounded(v) for v in value]
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

    def text(value: Any) -> str:
        return json.dumps(strict(rounded(value)), allow_nan=False)

    outer = []
    for key, value in record.items():
        if isinstance(value, dict) and key == "epochs":
            inner = ",\n".join(f"  {json.dumps(k)}: {text(v)}" for k, v in value.items())
            outer.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n".join(f"  {text(entry)}" for entry in value)
            outer.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            outer.append(f" {json.dumps(key)}: {text(value)}")
    return "{\n" + ",\n".join(outer) + "\n}\n"

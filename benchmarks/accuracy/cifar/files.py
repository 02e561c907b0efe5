"""What is on disk: checkpoints of runs that are begun, in an ignored folder, and records of those that are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from ..errors import DataError
from .records import Record, score, text
from .runs import Rates, Run, chosen
from .training import Training


def replace_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file atomically: whoever reads it, at any time, finds the old content or the new."""
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
        replace_whole(folder / "record.json", lambda file: file.write(text(training.record).encode()))

    def publish(self, training: Training) -> None:
        """Write the record to the results."""
        replace_whole(self._result(training.run), lambda file: file.write(text(training.record).encode()))

    def resume(self, training: Training) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            DataError: it cannot be read, or is of other settings, another machine or other images.
        """
        path = self.state / training.run.name / "checkpoint.pt"
        if not path.exists():
            return
        try:
            training.load(torch.load(path, map_location=training.device, weights_only=True))
        except Exception as error:  # what a broken file raises is not documented
            raise DataError(f"{path} cannot be resumed; delete its folder to begin the run again: {error}") from error

    def record(self, run: Run) -> Record | None:
        """Return the record of a run that is finished or begun; None of another."""
        for path in (self._result(run), self.state / run.name / "record.json"):
            if path.exists():
                found: Record = json.loads(path.read_text())
                return found
        return None

    def finished(self, run: Run) -> bool:
        """Whether the record is among the results."""
        return self._result(run).exists()

    def rates(self) -> Rates:
        """Return the learning rates that stage 0 has chosen so far."""
        records = [json.loads(path.read_text()) for path in sorted(self.results.glob("0-*.json"))]
        return chosen({Run(**record["run"]).name: score(record) for record in records})

    def _result(self, run: Run) -> Path:
        return self.results / f"{run.name}.json"

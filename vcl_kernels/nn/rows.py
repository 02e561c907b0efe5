"""What a monitor recorded: rows that wait on their devices, and where they are written."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .report import Report

__all__ = ["COLUMNS", "STATISTICS", "Row", "Rows", "read_csv"]

STATISTICS = ("loss", "share", "beta", "beta_least", "scale", "variance", "constancy", "kurtosis")
COLUMNS = ("step", "layer", *STATISTICS)


class Row:
    """One call of a layer: statistics by name, scalars on the device of its input. Those that lack are NaN."""

    def __init__(self, step: int, name: str, call: int, values: dict[str, Tensor]) -> None:
        self.step, self.name, self.call = step, name, call
        self.values = values  # share comes in backward
        self.stacked: tuple[tuple[str, ...], Tensor] | None = None
        self.process = os.getpid()

    @property
    def layer(self) -> str:
        """The layer's name, ``name:1`` for its second call."""
        return f"{self.name}:{self.call}" if self.call else self.name

    def stack(self) -> None:
        """Put what is there into one tensor: many small ones take more memory."""
        if self.values and self.stacked is None:
            self.stacked = tuple(self.values), torch.stack(list(self.values.values()))
            self.values = {}

    def tensors(self) -> list[tuple[tuple[str, ...], Tensor]]:
        """Return the tensors, of one dimension, with the names of their values."""
        stacked = [] if self.stacked is None else [self.stacked]
        return [*stacked, *(((name,), value.reshape(1)) for name, value in self.values.items())]


class Rows:
    """Rows that wait, rows that were fetched, and those of them that are still to be written.

    Args:
        path: of a CSV file, or None.
        folder: of TensorBoard, or None.
        writer: a ``SummaryWriter`` of the user's own, or None.
        report: gets why values could not be fetched.

    Raises:
        ValueError: the file has another header.
        FileNotFoundError: its folder does not exist.
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, path: Path | None, folder: str | None, writer: Any, report: Report) -> None:
        if path is not None:
            _check_csv(path)
        if folder is not None:
            _summary_writer_class()
        self.path, self.folder, self.writer, self.report = path, folder, writer, report
        self.process = os.getpid()
        self.waiting: list[Row] = []
        self.fetched: list[dict[str, Any]] = []  # of COLUMNS
        self.for_csv: list[dict[str, Any]] = []
        self.for_tensorboard: list[dict[str, Any]] = []
        self.rank = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what waits and where it is written: a copy has the fetched rows alone."""
        return {**Rows(None, None, None, self.report).__dict__, "fetched": self.fetched}

    @property
    def unwritten(self) -> bool:
        """Whether something is still to be written to a file."""
        writes = self.path is not None or self.folder is not None or self.writer is not None
        return bool(self.for_csv or self.for_tensorboard or (writes and self.waiting))

    def note_rank(self) -> None:
        """Remember this process's rank: its group may end before the last rows are written."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank = torch.distributed.get_rank()

    def flush(self, unfinished: Sequence[Row] = ()) -> list[dict[str, Any]]:
        """Fetch what waits, write it and what could not be written before; return the rows that were fetched.

        Args:
            unfinished: rows that go on waiting.
        """
        self._leave_to_parent()
        later = set(unfinished)
        waiting = [row for row in self.waiting if row not in later]
        rows = _fetch(waiting, self.report)
        done = set(waiting)
        self.waiting[:] = [row for row in self.waiting if row not in done]
        self.fetched += rows
        self.note_rank()
        if self.rank == 0:
            self.for_csv += rows if self.path is not None else []
            self.for_tensorboard += rows if self.folder is not None or self.writer is not None else []
        try:
            self._write_csv()
        finally:
            self._write_tensorboard()
        return rows

    def _leave_to_parent(self) -> None:
        """In a fork, forget what was recorded before: the parent process writes it."""
        if os.getpid() != self.process:
            self.process = os.getpid()
            self.waiting = [row for row in self.waiting if row.process == self.process]
            self.for_csv, self.for_tensorboard = [], []
            self.writer = self.writer if self.folder is None else None

    def close(self) -> None:
        """Close the ``SummaryWriter`` that was made here. The next flush that has rows makes another."""
        if self.folder is not None and self.writer is not None:
            self.writer.close()
            self.writer = None

    def _write_csv(self) -> None:
        if self.path is None or not self.for_csv:
            return
        with self.path.open("a+", newline="", encoding="utf-8") as file:
            end = file.seek(0, io.SEEK_END)
            text = io.StringIO()
            table = csv.DictWriter(text, COLUMNS)
            if end == 0:
                table.writeheader()
            elif not _ends_a_line(self.path):
                text.write("\r\n")
            table.writerows(self.for_csv)
            try:
                file.write(text.getvalue())
                file.flush()
            except OSError:  # a full disk: the rows are written again, so nothing of them may stay
                with suppress(OSError):
                    file.truncate(end)
                raise
        self.for_csv = []

    def _write_tensorboard(self) -> None:
        if not self.for_tensorboard:
            return
        if self.writer is None:
            self.writer = _summary_writer_class()(self.folder)
        while self.for_tensorboard:
            row = self.for_tensorboard[0]
            for name in STATISTICS:
                if not math.isnan(row[name]):
                    self.writer.add_scalar(f"{name}/{row['layer']}", row[name], row["step"])
            del self.for_tensorboard[0]
        self.writer.flush()


Part = tuple[dict[str, Any], str, tuple[str, ...], Tensor]  # of a row: the row, its layer, names, their values


def _fetch(waiting: list[Row], report: Report) -> list[dict[str, Any]]:
    """Return the values of ``waiting``, by one transfer from each device."""
    rows: list[dict[str, Any]] = [
        {"step": row.step, "layer": row.layer, **dict.fromkeys(STATISTICS, math.nan)} for row in waiting
    ]
    devices: dict[torch.device, list[Part]] = {}
    for fetched, row in zip(rows, waiting, strict=True):
        for names, tensor in row.tensors():
            devices.setdefault(tensor.device, []).append((fetched, row.name, names, tensor))
    for parts in devices.values():
        try:
            _fetch_parts(parts)
        except Exception:  # each by itself: one that fails costs its own row
            for part in parts:
                report.guard(part[1], partial(_fetch_parts, [part]))
    return rows


def _fetch_parts(parts: list[Part]) -> None:
    values = iter(torch.cat([tensor for *_, tensor in parts]).tolist())
    for fetched, _, names, _ in parts:
        fetched.update((name, next(values)) for name in names)


def _ends_a_line(path: Path) -> bool:
    """Whether the file, which is not empty, ends with one: a process that was killed may have left a part of one."""
    with path.open("rb") as file:
        file.seek(-1, io.SEEK_END)
        return file.read() == b"\n"


def _check_csv(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"csv must be in a folder that exists; got {str(path)!r}")
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), None)
        if header not in (None, list(COLUMNS)):
            raise ValueError(
                f"csv ({str(path)!r}) exists and has another header: {','.join(header)!r}, where {','.join(COLUMNS)!r} "
                "is wanted. Name another file"
            )


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard= needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file that a monitor wrote; a statistic that it lacks is NaN.

    A line that lacks fields is left out: a process was killed while it wrote it.

    Raises:
        ValueError: it is no such file, or has no rows.
    """
    rows: list[dict[str, Any]] = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if not {"step", "layer"} <= set(table.fieldnames or ()):
            raise ValueError(f"{str(path)!r} is no CSV of VCLMonitor: its header is {table.fieldnames}")
        for line in table:
            if any(field is None or field == "" for field in line.values()):
                continue
            try:
                if None in line:
                    raise ValueError("too many fields")
                numbers = {name: float(line.get(name, math.nan)) for name in STATISTICS}
                rows.append({"step": int(line["step"]), "layer": line["layer"], **numbers})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{str(path)!r} has a wrong line {table.line_num}: {line}") from error
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows")
    return rows

"""Results as they are kept: a CSV file with a row for each unit of work, a JSON file with the settings."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
import torch

from examples.demo import record

from .work import Record

FOLDERS = ("out", "data_dir")


def write(name: str, records: list[Record], settings: dict[str, Any], out: Path) -> None:
    """Write ``name``.csv and ``name``.json into ``out``, without the folders of the machine that made them."""
    rows = [flat({k: v for k, v in record.items() if k not in FOLDERS}) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    about = {
        "study": name,
        "settings": {k: v for k, v in settings.items() if k not in FOLDERS},
        "units": len(records),
        "versions": record.versions() | {"scipy": scipy.__version__, "scikit-learn": sklearn.__version__},
        "machine": record.machine(torch.device("cpu")),
    }
    record.write(about, out / f"{name}.json")


def flat(record: Record) -> Record:
    """Put the entries of inner dicts beside the others."""
    inner = [value if isinstance(value, dict) else {name: value} for name, value in record.items()]
    return {k: rounded(v) for part in inner for k, v in part.items()}


def rounded(value: Any) -> Any:
    """Return a float with 6 digits; "" for NaN, which JSON has not."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if value == value else ""


def read(name: str, folder: Path) -> list[Record]:
    """Return the rows of ``name``.csv, numbers as numbers; none if there is no such file."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def number(text: str) -> Any:
    """Return the int or float that ``text`` is, else ``text``."""
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            pass
    return text


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % confidence interval (Student's t)."""
    from scipy.stats import sem, t

    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(sem(values) * t.ppf(0.975, len(values) - 1))

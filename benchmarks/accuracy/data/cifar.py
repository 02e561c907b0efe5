"""CIFAR-10 and CIFAR-100 as they are published: pickles written by Python 2, read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SUBFOLDER = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
LABELS = {10: b"labels", 100: b"fine_labels"}
FILES = {
    10: {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    100: {"train": ["train"], "test": ["test"]},
}
RECONSTRUCT = np.empty(0).__reduce__()[0]


class ArraysOnly(pickle.Unpickler):
    """Plain Python values and numpy arrays: a pickle may name any function, and loading it would call that."""

    permitted = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.permitted:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file does")
        return self.permitted[module, name]


def read_batch(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 3, 32, 32) and labels (N,) of one file."""
    try:
        with path.open("rb") as file:
            batch = ArraysOnly(file, encoding="bytes").load()
    except Exception as error:  # what a broken pickle raises is not documented
        raise DataError(f"{path} cannot be read: {error}") from error
    label_key = LABELS[classes]
    if not isinstance(batch, dict) or not {b"data", label_key} <= batch.keys():
        raise DataError(f"{path} is no CIFAR-{classes} batch: it wants the entries 'data' and '{label_key.decode()}'")
    data, labels = batch[b"data"], batch[label_key]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise DataError(f"{path}: 'data' must be unsigned bytes of shape (N, 3072)")
    expected = range(classes)
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or any(type(y) is not int or y not in expected for y in labels)
    ):
        raise DataError(f"{path}: '{label_key.decode()}' must be {len(data)} integers from 0 to {classes - 1}")
    return data.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def paths(folder: Path, split: str, classes: int) -> list[Path]:
    """Return the files of ``"train"`` or ``"test"``; they may lie in ``folder`` or the usual one in it.

    Raises:
        DataError: one is missing.
    """
    inner = folder / SUBFOLDER[classes]
    found = [(inner if inner.is_dir() else folder) / name for name in FILES[classes][split]]
    for path in found:
        if not path.exists():
            raise DataError(
                f"{path} is missing; get CIFAR-{classes} (python version) from {SOURCE}, unpack it, "
                "and name its folder with --data-dir"
            )
    return found


def read_split(folder: Path, split: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of ``"train"`` or ``"test"``."""
    images, labels = zip(*(read_batch(path, classes) for path in paths(folder, split, classes)), strict=True)
    return np.concatenate(images), np.concatenate(labels)

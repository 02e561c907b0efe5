"""One run: a learner on a data set for some epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.demo.learning import Learner

from .data import Data

EVALUATION_BATCH = 500


@dataclass
class Run:
    """What one run leaves, epoch by epoch."""

    train_loss: list[float] = field(default_factory=list)  # mean objective
    test_accuracy: list[float] = field(default_factory=list)
    test_nll: list[float] = field(default_factory=list)  # mean negative log-likelihood


def train(
    learner: Learner,
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    after: Callable[[Run], None] = lambda _: None,
) -> Run:
    """Train in batches of equal size (what is left over waits for another epoch's order); call ``after`` each epoch."""
    order = torch.Generator().manual_seed(seed)
    run = Run()
    for _ in range(epochs):
        run.train_loss.append(learner.epoch(data.train_x, data.train_y, batch_size, order))
        accuracy, nll = scores(learner.model, data.test_x, data.test_y)
        run.test_accuracy.append(accuracy)
        run.test_nll.append(nll)
        after(run)
    return run


@torch.no_grad()
def scores(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return accuracy and mean negative log-likelihood, in evaluation."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=x.device)
    nll = torch.zeros((), dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True):
        logits = model(a).float()
        right += (logits.argmax(1) == b).sum()
        nll += F.cross_entropy(logits, b, reduction="sum")
    return int(right) / len(y), float(nll) / len(y)

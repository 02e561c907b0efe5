"""A small network with one of three methods, its optimizer, and one training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vcl_kernels as vk

METHODS = {"none": "no normalisation", "bn": "batch norm", "vcl": "VCL"}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
CLIP = 1.0  # gradient norm; without it the plain network diverges at learning rates that suit the others


class Block(nn.Sequential):
    """Convolution 3x3, batch norm if wanted, ELU: VCL, like batch norm, sees what enters the ELU."""

    def __init__(self, inputs: int, outputs: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm)  # batch norm has its own bias
        if batch_norm:
            self.norm = nn.BatchNorm2d(outputs)
        self.elu = nn.ELU()


def network(channels: int, classes: int, batch_norm: bool) -> nn.Sequential:
    """Five ELU layers; any image of 8x8 or more."""
    return nn.Sequential(
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


class Learner:
    """A network with its optimizer, and the VCL where it is the method."""

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
        groups = parameter_groups(model, weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
        self.schedule: torch.optim.lr_scheduler.LRScheduler
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, and the VCL where it is the method."""
        loss = F.cross_entropy(self.model(x), y)
        return loss if self.handle is None else loss + self.handle.loss()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch; return the objective."""
        self.optimizer.zero_grad()
        objective = self.objective(x, y)
        objective.backward()
        self.clip()
        self.optimizer.step()
        return objective.detach()

    def clip(self) -> None:
        """Bound the norm of the gradient."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_beta: bool = False) -> list[dict[str, Any]]:
    """Weights decay; biases and the scales of norms do not, nor, unless it is wanted, does VCL's beta."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            undecayed = isinstance(module, NORMS) or name == "bias" or (name == "beta" and not decay_beta)
            (free if undecayed else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def demo_learner(
    method: str,
    example: Tensor,
    classes: int,
    *,
    seed: int,
    weight: float,
    sub_batch_size: int,
    form: str,
    **settings: Any,
) -> Learner:
    """The demo's network under one method. For one seed, all methods start from the same weights."""
    model = network(example.shape[1], classes, method == "bn").to(example.device)
    torch.manual_seed(seed)
    initialise(model)
    handle = None
    if method == "vcl":
        handle = vk.attach(model, example, weight=weight, sub_batch_size=sub_batch_size, form=form)
    return Learner(model, handle, **settings)


def initialise(model: nn.Module, *, he: bool = True) -> None:
    """He's normal weights and zero biases, or PyTorch's own default, whose weights have a sixth of that variance."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if not he:
                module.reset_parameters()
                continue
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def middle(model: nn.Module) -> nn.Module:
    """The ELU whose pre-activations are shown: the third of five."""
    assert isinstance(model, nn.Sequential)
    block = model[3]
    assert isinstance(block, Block)
    return block.elu

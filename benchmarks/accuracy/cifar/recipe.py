"""The training of the authors' code, written anew: initialisation, optimizer, schedule, augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vcl_kernels as vk

from ..methods import ACTIVATIONS, initialise
from ..models import elu_11
from .runs import METHODS

NORMS = (nn.BatchNorm2d, nn.GroupNorm)
BATCH = 250
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
CLIP = 1.0  # norm of each parameter's gradient
DROPS = {3 / 8: 0.2, 5 / 8: 0.1, 7 / 8: 0.1}  # from that share of the run on, the learning rate times this
BORDER = 4  # pixels of zeros around an image, before it is cropped


def network(method: str, classes: int, k: float) -> nn.Sequential:
    """Return the 11-layer network with the norm, activation and initialisation of ``method``."""
    chosen = METHODS[method]
    norms = {"batch_norm": chosen.norm == "batch", "group_norm": chosen.norm == "group"}
    model = elu_11(classes, k=k, activation=ACTIVATIONS[chosen.activation], **norms)
    initialise(model, he=chosen.he)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def attach(model: nn.Module, method: str, example: Tensor) -> vk.VCLHandle | None:
    """Put VCL on, where it is the method."""
    settings = METHODS[method].vcl
    return None if settings is None else vk.attach(model, example, **settings)


def clip_each(parameters: list[nn.Parameter]) -> None:
    """Bound the norm of each parameter's gradient, without a synchronisation."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((CLIP / (norms + 1e-6)).clamp(max=1).unbind()))


def drop(step: int, steps: int) -> float:
    """Return the factor of the learning rate at ``step`` of ``steps``."""
    found = 1.0
    for share, times in DROPS.items():
        found *= times if step >= share * steps else 1.0
    return found


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights decay, and VCL's betas; biases and the scales of norms do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (free if isinstance(module, NORMS) or name == "bias" else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]


class ReferenceLearner:
    """A network, the VCL where it is the method, and SGD with Nesterov momentum."""

    def __init__(
        self, model: nn.Module, handle: vk.VCLHandle | None, *, steps: int, learning_rate: float, dtype: torch.dtype
    ) -> None:
        self.model, self.handle = model, handle
        self.parameters = list(model.parameters())
        self.autocast = torch.autocast(self.parameters[0].device.type, dtype, enabled=dtype != torch.float32)
        groups = parameter_groups(model)
        self.optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=MOMENTUM, nesterov=True, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: drop(step, steps))

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy and the weighted VCL, 0 where that is not the method."""
        with self.autocast:
            task = F.cross_entropy(self.model(x), y)
        return task, torch.zeros_like(task) if self.handle is None else self.handle.loss()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch; return both losses."""
        self.optimizer.zero_grad()
        task, penalty = self.losses(x, y)
        (task + penalty).backward()
        clip_each(self.parameters)
        self.optimizer.step()
        self.schedule.step()
        return torch.stack([task.detach(), penalty.detach()])


@dataclass(frozen=True)
class Epoch:
    """The draws of one epoch: which images come when, how each is moved, which are mirrored."""

    order: Tensor  # (N,)
    corner: Tensor  # (2, N): row and column of the crop in the image with its border
    mirrored: Tensor  # (N,)


def draw(count: int, random: torch.Generator, device: torch.device) -> Epoch:
    """Draw an epoch on the CPU, whatever the device, so that every device sees the same."""
    order = torch.randperm(count, generator=random)
    corner = torch.randint(0, 2 * BORDER + 1, (2, count), generator=random)
    mirrored = torch.rand(count, generator=random) < 0.5
    return Epoch(order.to(device), corner.to(device), mirrored.to(device))


def crop_and_flip(x: Tensor, corner: Tensor, mirrored: Tensor) -> Tensor:
    """Return each image moved by up to 4 pixels over a border of zeros, mirrored where wanted; channels_last."""
    N, _, H, W = x.shape
    rows = corner[0, :, None] + torch.arange(H, device=x.device)
    columns = corner[1, :, None] + torch.arange(W, device=x.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(N, device=x.device)
    padded = F.pad(x, 4 * [BORDER])
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

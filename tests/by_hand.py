"""One step written out in plain PyTorch, to which the steps of other libraries' trainers are held."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from common import assert_within_budget
from torch import Tensor, nn

import vcl_kernels as vk

WEIGHT = 0.3  # so large that VCL has a part in the gradients that shows
LARGEST_ERROR = 4e-6  # of a gradient in float32, as a part of the largest gradient
ACTIVATIONS = ("ELU", "GELUActivation", "Tanh")


def network() -> nn.Module:
    """Three activations: two that are fused, after a convolution and a linear layer, and tanh."""
    torch.manual_seed(0)
    body = nn.Conv2d(1, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(144, 8), nn.ELU()
    return nn.Sequential(*body, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(number: int, rows: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Return images and labels."""
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 1, 8, 8, generator=draw), torch.randint(3, (rows,), generator=draw)) for _ in range(number)
    ]


def loader(batches: list) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(batches, batch_size=None)


def task(net: Callable, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(net(images), labels)


def gradients(
    net: nn.Module,
    batches: Iterable[Any],
    task: Callable = task,
    *,
    weight: float = WEIGHT,
    clip: float | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """Gradients of the mean over batches of the task's loss and of VCL at the input of each activation.

    ``net`` is plain, and stays as it is.
    """
    net, inputs, batches = copy.deepcopy(net), [], list(batches)
    for module in net.modules():
        if type(module).__name__ in ACTIVATIONS:
            module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    for batch in batches:
        inputs.clear()
        with context():
            loss = task(net, batch)
        vcl = sum(vk.reference.vcl_loss(x, 1.0, unit="activation") for x in inputs)
        ((loss + weight * vcl) / len(batches)).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def step(before: nn.Module, after: nn.Module, rate: float = 1.0) -> dict[str, Tensor]:
    """The gradients of one step of SGD."""
    new = dict(after.named_parameters())
    return {name: ((p - new[name]) / rate).detach() for name, p in before.named_parameters()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], largest_error: float = LARGEST_ERROR) -> None:
    """Compare gradients, of which each error is a part of the largest one."""
    largest = max(float(g.detach().abs().max()) for g in wanted.values())
    errors = {name: float((found[name] - g).detach().abs().max()) / largest for name, g in wanted.items()}
    assert max(errors.values()) <= largest_error, max(errors, key=errors.get)


def assert_as_exact(found: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Hold gradients in a lower precision to the error budget: twice the error of eager PyTorch in it."""
    a, e, x = (torch.cat([gradients[name].flatten() for name in exact]) for gradients in (found, eager, exact))
    assert_within_budget(a, [e], x)

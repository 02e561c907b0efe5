"""The methods that are compared, and what each puts into a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vcl_kernels as vk
from examples.demo import learning
from examples.demo.learning import Learner

from .models import mlp

METHODS = {
    "none": "no normalisation",
    "bn": "batch norm",
    "ln": "layer norm",
    "vcl-ratio": "VCL, ratio",
    "vcl-relative": "VCL, relative_variance",
}
IMAGE_METHODS = {  # where a channel has many activations; layer norm is for fully connected networks
    **{method: name for method, name in METHODS.items() if method != "ln"},
    "vcl-channel": "VCL, ratio, channel units",
    "vcl-pairs": "VCL, ratio, as many pairs as the batch has",
    "vcl-n10": "VCL, ratio, n = 10",
    "vcl-n25": "VCL, ratio, n = 25",
    "vcl-beta100": "VCL, ratio, β from 100",
}
IMAGE_DEFAULT = ("none", "bn", "vcl-ratio", "vcl-relative", "vcl-channel")  # the others answer questions of their own
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU}

ALL = 1 << 30  # sub-batches: as many as the batch has
SUB_BATCH = 5  # n, but where the method says another
# The paper's form learns beta from 1; relative_variance needs none where no unit is dead, so its guard stays small.
RATIO: dict[str, Any] = {"form": "ratio", "beta_mode": "learned"}
VCL: dict[str, dict[str, Any]] = {
    "vcl-ratio": RATIO,
    "vcl-channel": RATIO | {"unit": "channel"},
    "vcl-pairs": RATIO | {"num_sub_batches": ALL},
    "vcl-n10": RATIO | {"sub_batch_size": 10},
    "vcl-n25": RATIO | {"sub_batch_size": 25},
    "vcl-beta100": RATIO | {"beta_init": 100.0},
    "vcl-relative": {"form": "relative_variance", "beta_mode": "fixed", "beta_init": 1e-3},
}


def redundant(method: str, batch: int) -> bool:
    """Whether ``"vcl-pairs"`` is the same as ``"vcl-ratio"``: a batch below 20 samples has only one pair."""
    return method == "vcl-pairs" and batch < 4 * SUB_BATCH


def multilayer(inputs: int, classes: int, method: str, activation: str, *, depth: int, width: int) -> nn.Sequential:
    """``depth`` hidden layers of ``width``, with the normalisation that is the method, if it is one."""
    norms = {"batch_norm": method == "bn", "layer_norm": method == "ln"}
    return mlp(classes, inputs=inputs, depth=depth, width=width, activation=ACTIVATIONS[activation], **norms)


def initialise(model: nn.Module, *, he: bool = True) -> None:
    """He's normal weights and zero biases, or PyTorch's own default, whose weights have a sixth of that variance."""
    if he:
        learning.initialise(model)
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()


def learner(
    model: nn.Module,
    method: str,
    example: Tensor,
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    he: bool = True,
    **vcl: Any,
) -> Learner:
    """Initialise by ``seed``, put VCL on where it is the method (``vcl`` over its own settings), add the optimizer."""
    torch.manual_seed(seed)
    initialise(model, he=he)
    handle = attach(model, method, example, **vcl)
    return Learner(model, handle, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay)


def attach(model: nn.Module, method: str, example: Tensor, **vcl: Any) -> vk.VCLHandle | None:
    """Put VCL on where it is the method, ``vcl`` over its own settings: on channel units, the ratio of one pair."""
    if method not in VCL:
        return None
    settings = {"unit": "channel", "weight": 0.01, **VCL[method], **vcl}
    if settings["form"] == "ratio":
        settings.setdefault("num_sub_batches", 2)
    return vk.attach(model, example, **settings)

"""The ops beside everything else that a user could choose, and the bytes that each job must move."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vcl_kernels as vk
from vcl_kernels.options import BackendName

from ..cases import Case
from .race import Candidate, Factories

ALL: dict[str, Any] = {"form": "relative_variance", "sub_batch_size": 8}  # every sub-batch takes part
LOSSES: dict[str, dict[str, Any]] = {
    "relative_variance": ALL,
    "ratio": {"sub_batch_size": 5},
    "variance": {"form": "variance", "sub_batch_size": 8},
    "relative_variance per activation": {**ALL, "unit": "activation"},
    "ratio per activation": {"sub_batch_size": 5, "unit": "activation"},
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}
FROM_OUTPUT = ("elu", "relu", "leaky_relu", "tanh")  # saved for backward: y, and the rows of the pair


class Inputs:
    """Tensors of one case, made when first wanted, and candidates that read them."""

    def __init__(self, case: Case, device: str, backend: BackendName | None) -> None:
        self.case, self.device = case, device
        self.vcl_loss = partial(vk.vcl_loss, backend=backend)
        self.vcl_activation = partial(vk.vcl_activation, backend=backend)

    @cached_property
    def x(self) -> Tensor:
        return self.case.tensor(self.device).requires_grad_()

    @cached_property
    def dy(self) -> Tensor:
        return torch.randn_like(self.x)

    @cached_property
    def affine(self) -> tuple[Tensor, Tensor]:
        C, device = self.case.shape[1], self.device
        return torch.ones(C, device=device).requires_grad_(), torch.zeros(C, device=device).requires_grad_()

    @cached_property
    def affine_of_dtype(self) -> tuple[Tensor, Tensor]:
        weight, bias = (t.detach().to(self.x.dtype).requires_grad_() for t in self.affine)
        return weight, bias

    @cached_property
    def running(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.affine
        return bias.detach().clone(), weight.detach().clone()

    def batch_norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, *self.running, *self.affine, True)

    def group_norm(self, x: Tensor) -> Tensor:
        return F.group_norm(x, math.gcd(32, x.shape[1]), *self.affine_of_dtype)

    def layer_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, -1), (x.shape[1],), *self.affine_of_dtype).transpose(1, -1)

    def loss(self, function: Callable[..., Tensor], **options: Any) -> Candidate:
        return Candidate(lambda: [function(self.x, **options)], [None], [self.x])

    def value(self, function: Callable[[Tensor], Tensor]) -> Candidate:
        return Candidate(lambda: [function(self.x)], [self.dy], [self.x, *self.affine, *self.affine_of_dtype])

    def value_and_loss(self, function: Callable[..., tuple[Tensor, Tensor]], **options: Any) -> Candidate:
        return Candidate(lambda: list(function(self.x, **options)), [self.dy, None], [self.x])

    def copy(self) -> Candidate:
        x, out = self.x.detach(), torch.empty_like(self.x)

        def forward() -> None:
            out.copy_(x)

        return Candidate(forward)


def authors(x: Tensor) -> Tensor:
    """The paper's formula as a user would write it: split, two variances, beta = 1."""
    a, b = x[:10].split(5)
    return (1 - a.var(0) / (b.var(0) + 1)).square().mean()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def losses(i: Inputs, with_compiled: bool = False) -> Factories:
    """vcl_loss in each form and unit; its formula in PyTorch; the normalisations; the copy."""
    reference = partial(vk.reference.vcl_loss, **ALL)
    found: Factories = {"copy": i.copy}
    found |= {name: partial(i.loss, i.vcl_loss, **options) for name, options in LOSSES.items()}
    found["reference"] = partial(i.loss, reference)
    found["split, var, var"] = partial(i.loss, authors)
    found["batch norm"] = partial(i.value, i.batch_norm)
    if len(i.case.shape) > 2:
        found["group norm"] = partial(i.value, i.group_norm)
    if len(i.case.shape) == 2 or i.case.layout == "tokens":
        found["layer norm"] = partial(i.value, i.layer_norm)
    if with_compiled:
        found["reference, compiled"] = lambda: i.loss(compiled(reference))
        found["batch norm, compiled"] = lambda: i.value(compiled(i.batch_norm))
    return found


def activations(i: Inputs, with_compiled: bool = False) -> Factories:
    """vcl_activation for each activation, beside the bare one and batch norm before it; the copy."""

    def apart(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.elu(x), i.vcl_loss(x, **ALL)

    def normalised(bare: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return bare(i.batch_norm(x))

    found: Factories = {"copy": i.copy}
    for name, bare in ACTIVATIONS.items():
        found[name] = partial(i.value, bare)
        for form in ("ratio", "relative_variance"):
            found[f"{name} with {form}"] = partial(i.value_and_loss, i.vcl_activation, activation=name, **LOSSES[form])
    found["elu and relative_variance apart"] = partial(i.value_and_loss, apart)
    for name in ("elu", "relu"):
        both = partial(normalised, ACTIVATIONS[name])
        found[f"batch norm, {name}"] = partial(i.value, both)
        if with_compiled:
            found[f"batch norm, {name}, compiled"] = lambda both=both: i.value(compiled(both))  # type: ignore[misc]
    return found


def floor_bytes(case: Case, candidate: str, phase: str) -> int | None:
    """Bytes of x, y, dy and dx that must cross memory; None for candidates that do another job.

    ``candidate`` is a name that :func:`losses` or :func:`activations` gives.
    """
    row, E = case.bytes // case.shape[0], case.bytes
    pair, every = 10 * row, case.shape[0] // 8 * 8 * row
    name, _, form = candidate.partition(" with ")
    if candidate == "copy":
        least = {"both": 2 * E}
    elif candidate in LOSSES and candidate.startswith("ratio"):
        least = {"forward": 2 * pair, "backward": pair + E}  # the pair is saved in forward; dx is 0 in other rows
    elif candidate in LOSSES:
        least = {"forward": every + E}
    elif name in ACTIVATIONS:
        rows = pair if form == "ratio" and name in FROM_OUTPUT and case.shape[0] >= 20 else 0
        least = {"forward": 2 * E + rows, "backward": 3 * E + rows}
    else:
        return None
    return sum(least.values()) if phase == "both" else least.get(phase)

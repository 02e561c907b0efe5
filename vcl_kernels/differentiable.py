"""Loss, activation and moments with their gradients: autograd functions in eager code, ops in a compiler's graph.

Dynamo traces into an autograd function and then makes no check that what backward reads is unchanged: compiled code
would take a gradient from values that were overwritten. An op it leaves whole. AOTAutograd then runs the op's autograd
kernel, which is the same autograd function as in eager code, with the same checks; its graph holds the kernels' ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd, ops, reference
from .autograd import Injection, injected, wants_gradient
from .options import Activation, LossSpec

ops.define(f"loss_autograd(Tensor x, Tensor? beta, {ops.SPEC}) -> Tensor")
ops.define(
    f"activation_autograd(Tensor x, Tensor? beta, {ops.SPEC}, {ops.ACTIVATION}, bool inject) -> (Tensor y, Tensor loss)"
)
ops.define("moments_autograd(Tensor x, SymInt n, SymInt K, bool per_activation) -> (Tensor mean, Tensor var)")

_LOSS = len(LossSpec._fields)


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Any) -> Tensor:
    """Differentiable loss of ``x``, which lies in a supported layout."""
    if _in_graph(backend) and wants_gradient(x, beta):
        return torch.ops.vcl_kernels.loss_autograd.default(x, beta, *spec)
    return autograd.loss(x, beta, spec, backend)


def activation_and_loss(
    x: Tensor, activation: Activation, beta: Tensor | None, spec: LossSpec, backend: Any, injection: Injection | None
) -> tuple[Tensor, Tensor]:
    """Differentiable activation and loss of ``x``, which lies in a supported layout."""
    # An export is for batches of any size, so that it chooses nothing by the number of rows
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and 4 * spec.K * spec.n <= x.shape[0]:
        # a compiler fuses the bare activation with its neighbours, which saves more than a few rows cost; x may be
        # overwritten afterwards where the activation allows it (a compiler leaves out the copy where nothing does)
        y, value = reference.activate(x, activation), loss(x[: spec.K * spec.n].clone(), beta, spec, backend)
        if injection is None:
            return y, value
        y, value = injected(y, value, injection)
        return y.clone(), value  # of a view, a compiler refuses changes in place that eager code allows
    if _in_graph(backend) and not wants_gradient(x, beta):
        return ops.activation(x, beta, *spec, False, *activation, False)[:2]
    scaled = injection is not None and injection.scaler is not None  # which no graph holds: it breaks there
    if _in_graph(backend) and not scaled:
        inject = injection is not None
        return torch.ops.vcl_kernels.activation_autograd.default(x, beta, *spec, *activation, inject)
    return autograd.ActivationAndLoss.apply(x, beta, (activation, spec, backend, injection))[:2]


def moments(x: Tensor, n: int, K: int, per_activation: bool, backend: Any) -> tuple[Tensor, Tensor]:
    """Differentiable moments of ``x``, which lies in a supported layout."""
    if _in_graph(backend) and wants_gradient(x, None):
        return torch.ops.vcl_kernels.moments_autograd.default(x, n, K, per_activation)
    return autograd.Moments.apply(x, n, K, per_activation, backend)


def _in_graph(backend: Any) -> bool:
    return torch.compiler.is_compiling() and backend is ops


def _loss_with_autograd(x: Tensor, beta: Tensor | None, *spec: Any) -> Tensor:
    return autograd.loss(x, beta, LossSpec(*spec), ops)


def _activation_with_autograd(x: Tensor, beta: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    spec, (*activation, inject) = LossSpec(*settings[:_LOSS]), settings[_LOSS:]
    how = (Activation(*activation), spec, ops, Injection() if inject else None)
    return autograd.ActivationAndLoss.apply(x, beta, how)[:2]


def _moments_with_autograd(x: Tensor, n: int, K: int, per_activation: bool) -> tuple[Tensor, Tensor]:
    return autograd.Moments.apply(x, n, K, per_activation, ops)


for _name, _function in (
    ("loss_autograd", _loss_with_autograd),
    ("activation_autograd", _activation_with_autograd),
    ("moments_autograd", _moments_with_autograd),
):
    ops.library.impl(_name, _function, "Autograd")
    ops.library.impl(_name, _function, "CompositeExplicitAutograd")  # where nothing wants a gradient
    torch.library.register_fake(f"vcl_kernels::{_name}", _function, lib=ops.library)

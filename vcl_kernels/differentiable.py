"""Loss, activation and moments with their gradients: autograd functions in eager code, ops in a compiler's graph.

Dynamo traces into an autograd function and then does not check that saved tensors are unchanged: compiled code would
take a gradient from values that were overwritten. An op it leaves whole. AOTAutograd then runs the op's autograd
kernel, which is the same autograd function as in eager code, with the same checks; its graph holds the kernels' ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd, ops, reference, saving
from .autograd import ActivationAndLoss, ActivationSettings, wants_gradient
from .backends.interface import Backend
from .injection import Injection, injected
from .options import Activation, LossSpec, SubBatches

ops.define(f"loss_autograd(Tensor x, Tensor? beta, {ops.SPEC}) -> Tensor")
ops.define(
    f"activation_autograd(Tensor x, Tensor? beta, {ops.SPEC}, {ops.ACTIVATION}, bool inject) -> (Tensor y, Tensor loss)"
)
ops.define("moments_autograd(Tensor x, SymInt n, SymInt K, bool per_activation) -> (Tensor mean, Tensor var)")

_LOSS = len(LossSpec._fields)


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Backend) -> Tensor:
    """Differentiable loss of ``x``, which lies in a supported layout."""
    if _in_graph(backend) and wants_gradient(x, beta):
        return torch.ops.vcl_kernels.loss_autograd.default(x, beta, *spec)
    return autograd.loss(x, beta, spec, backend)


def activation_and_loss(x: Tensor, beta: Tensor | None, settings: ActivationSettings) -> tuple[Tensor, Tensor]:
    """Differentiable activation and loss of ``x``, which lies in a supported layout."""
    activation, spec, backend, injection = settings
    if saving.apart_in_graph(x, spec):
        # x may be overwritten afterwards, where the activation allows it: a compiler leaves the clone out otherwise
        y, value = reference.activate(x, activation), loss(x[: spec.K * spec.n].clone(), beta, spec, backend)
        if injection is None:
            return y, value
        y, value = injected(y, value, injection)
        return y.clone(), value  # a compiler refuses changes in place of a view, which eager code allows
    if _in_graph(backend) and not wants_gradient(x, beta):
        return ops.activation(x, beta, spec, activation, False, False)[:2]
    scaled = injection is not None and injection.scaler is not None  # no graph holds a scaler: it breaks there
    if _in_graph(backend) and not scaled:
        inject = injection is not None
        return torch.ops.vcl_kernels.activation_autograd.default(x, beta, *spec, *activation, inject)
    return ActivationAndLoss.apply(x, beta, settings)[:2]


def moments(x: Tensor, sub_batches: SubBatches, backend: Backend) -> tuple[Tensor, Tensor]:
    """Differentiable moments of ``x``, which lies in a supported layout."""
    if _in_graph(backend) and wants_gradient(x, None):
        return torch.ops.vcl_kernels.moments_autograd.default(x, *sub_batches)
    return autograd.Moments.apply(x, sub_batches, backend)


def _in_graph(backend: Backend) -> bool:
    return torch.compiler.is_compiling() and backend is ops


def _loss_autograd(x: Tensor, beta: Tensor | None, *spec: Any) -> Tensor:
    return autograd.loss(x, beta, LossSpec(*spec), ops)


def _activation_autograd(x: Tensor, beta: Tensor | None, *plain: Any) -> tuple[Tensor, Tensor]:
    spec, (kind, parameter, inject) = LossSpec(*plain[:_LOSS]), plain[_LOSS:]
    settings = ActivationSettings(Activation(kind, parameter), spec, ops, Injection() if inject else None)
    return ActivationAndLoss.apply(x, beta, settings)[:2]


def _moments_autograd(x: Tensor, *sub_batches: Any) -> tuple[Tensor, Tensor]:
    return autograd.Moments.apply(x, SubBatches(*sub_batches), ops)


for _function in (_loss_autograd, _activation_autograd, _moments_autograd):
    _name = _function.__name__.removeprefix("_")
    ops.library.impl(_name, _function, "Autograd")
    ops.library.impl(_name, _function, "CompositeExplicitAutograd")  # where nothing wants a gradient
    torch.library.register_fake(f"vcl_kernels::{_name}", _function, lib=ops.library)

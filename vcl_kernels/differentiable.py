"""Loss, activation and moments with their gradients: autograd functions in eager code, ops in a compiler's graph.

Dynamo traces into an autograd function and then does not check that saved tensors are unchanged: compiled code would
take a gradient from values that were overwritten. An op it leaves whole. AOTAutograd then runs the op's autograd
kernel, which is the same autograd function as in eager code, with the same checks; its graph holds the kernels' ops.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import autograd, ops, reference, saving
from .autograd import ActivationAndLoss, ActivationSettings, wants_gradient
from .backends.interface import Backend
from .geometry import accumulation_dtype
from .injection import Injection, injected
from .ops import LOSS, Op
from .options import Activation, LossSpec, SubBatches


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Backend) -> Tensor:
    """Differentiable loss of ``x``, which lies in a supported layout."""
    if _in_graph(backend) and wants_gradient(x, beta):
        return torch.ops.vcl_kernels.loss_autograd.default(x, beta, *spec)
    return autograd.loss(x, beta, spec, backend)


def activation_and_loss(x: Tensor, beta: Tensor | None, settings: ActivationSettings) -> tuple[Tensor, Tensor]:
    """Differentiable activation and loss of ``x``, which lies in a supported layout."""
    activation, spec, backend, injection = settings
    if saving.apart_in_graph(x, spec):
        # Clone: x may be changed in place later. A compiler drops the clone if it is not.
        y, value = reference.activate(x, activation), loss(x[: spec.K * spec.n].clone(), beta, spec, backend)
        if injection is None:
            return y, value
        y, value = injected(y, value, injection)
        return y.clone(), value  # a compiler refuses changes in place of a view, which eager code allows
    if _in_graph(backend) and not wants_gradient(x, beta):
        return ops.activation(x, beta, spec, activation, False, False)[:2]
    scaled = injection is not None and injection.scaler is not None  # a graph cannot hold a GradScaler, and breaks here
    if _in_graph(backend) and not scaled:
        upstream = None
        if injection is not None:  # by a tensor, for an op's numbers are constants of the graph
            upstream = x.new_ones((), dtype=accumulation_dtype(x.dtype)) * injection.factor
        return torch.ops.vcl_kernels.activation_autograd.default(x, beta, *spec, *activation, upstream)
    return ActivationAndLoss.apply(x, beta, settings)[:2]


def moments(x: Tensor, sub_batches: SubBatches, backend: Backend) -> tuple[Tensor, Tensor]:
    """Differentiable moments of ``x``, which lies in a supported layout."""
    if not wants_gradient(x, None):
        return backend.moments(x, sub_batches)
    if _in_graph(backend):
        return torch.ops.vcl_kernels.moments_autograd.default(x, *sub_batches)
    return autograd.Moments.apply(x, sub_batches, backend)


def _in_graph(backend: Backend) -> bool:
    return torch.compiler.is_compiling() and backend is ops


def _activation(
    x: Tensor, beta: Tensor | None, spec: LossSpec, activation: Activation, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    injection = None if upstream is None else Injection(given=upstream)
    settings = ActivationSettings(activation, spec, ops, injection)
    return ActivationAndLoss.apply(x, beta, settings)[:2]


for _op, _function in (
    (Op("loss_autograd", LOSS, "Tensor"), partial(autograd.loss, backend=ops)),
    (Op("activation_autograd", (*LOSS, Activation, "Tensor? upstream"), "(Tensor y, Tensor loss)"), _activation),
    (
        Op("moments_autograd", ("Tensor x", SubBatches), "(Tensor mean, Tensor var)"),
        lambda x, sub_batches: autograd.Moments.apply(x, sub_batches, ops),
    ),
):
    _op.define()
    _op.implement(_function, "Autograd")
    _op.implement(_function, "CompositeExplicitAutograd")  # where nothing wants a gradient
    _op.implement(_function, "Fake")

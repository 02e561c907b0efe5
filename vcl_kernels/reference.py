"""The same functions in plain PyTorch: the oracle of the tests, and the formulas of the package.

Readable, differentiable to any order, on any device; several passes over memory. The loss of a unit with
sub-batch variances v_0 … v_{K-1} (unbiased), and with beta:

- ratio: the mean over pairs (a, b) = (0, 1), (2, 3), … of (1 - v_a / (v_b + beta))²
- variance: V = Σ (v_k - v̄)² / (K - 1)
- relative_variance: V / (v̄ + beta)²

Source: Littwin & Wolf, "Regularizing by the Variance of the Activations' Sample-Variances", NeurIPS 2018, for
the ratio; the other two measure the same variation over more than two sub-batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_activation, check_loss, check_moments
from .geometry import dense_strides, with_strides
from .options import (
    IDENTITY,
    NO_MINIMUM,
    Activation,
    ActivationName,
    Approximate,
    Form,
    LossSpec,
    Reduction,
    SubBatches,
    Unit,
)
from .torch_private import has_transform

__all__ = ["sub_batch_moments", "vcl_activation", "vcl_loss"]


def vcl_loss(
    x: Tensor,
    beta: float | Tensor | None = None,
    *,
    sub_batch_size: int = 5,
    form: Form = "ratio",
    unit: Unit = "channel",
    num_sub_batches: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Variance constancy loss of ``x``: see :func:`vcl_kernels.vcl_loss`, which this defines."""
    beta, spec = check_loss(x, beta, sub_batch_size, form, unit, num_sub_batches, reduction)
    return loss(in_layout_of_gradient(x), beta, spec)


def vcl_activation(  # noqa: PLR0913  # the public signature
    x: Tensor,
    activation: ActivationName = "elu",
    beta: float | Tensor | None = None,
    *,
    alpha: float = 1.0,
    negative_slope: float = 0.01,
    approximate: Approximate = "none",
    sub_batch_size: int = 5,
    form: Form = "ratio",
    unit: Unit = "channel",
    num_sub_batches: int | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    """Activation of ``x`` and its loss: see :func:`vcl_kernels.vcl_activation`, which this defines."""
    beta, spec = check_loss(x, beta, sub_batch_size, form, unit, num_sub_batches, reduction)
    return activation_and_loss(x, check_activation(activation, alpha, negative_slope, approximate), beta, spec)


def sub_batch_moments(
    x: Tensor, sub_batch_size: int, *, unit: Unit = "channel", num_sub_batches: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each sub-batch: see :func:`vcl_kernels.sub_batch_moments`."""
    sub_batches = check_moments(x, sub_batch_size, unit, num_sub_batches)
    return moments(in_layout_of_gradient(x), sub_batches)


def moments(x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance ``(K, *units)``, in float32 for half precision."""
    n, K, per_activation = sub_batches
    samples = x[: K * n].unflatten(0, (K, n))
    if samples.dtype in (torch.float16, torch.bfloat16):
        samples = samples.float()
    over = [1] if per_activation else [1, *range(3, samples.dim())]
    if samples.numel() == 0:
        return samples.sum(over), samples.sum(over)
    var, mean = torch.var_mean(samples, over, correction=1)
    return mean, var


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec) -> Tensor:
    """``factor`` times the loss of each unit, or their sum if ``spec.reduce``."""
    _, var = moments(x, spec.sub_batches)
    acting = bounded_beta(spec.beta_value if beta is None else beta, spec.beta_min)
    per_unit = loss_of_variances(var, acting, spec.form_name)
    return spec.factor * (per_unit.sum() if spec.reduce else per_unit)


def activation_and_loss(
    x: Tensor, activation: Activation, beta: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """The bare activation, which is x itself if it is the identity, and the loss."""
    inside = in_layout_of_gradient(x)
    return x if activation == IDENTITY else activate(inside, activation), loss(inside, beta, spec)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The bare activation, PyTorch's own."""
    name, parameter = activation.name, activation.parameter
    if name == "identity":
        return x
    if name == "leaky_relu":
        return F.leaky_relu(x, parameter)
    if name == "elu":
        return F.elu(x, parameter)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="none" if name == "gelu" else "tanh")
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    if name == "tanh":
        return torch.tanh(x)
    raise NotImplementedError(name)


def activation_gradient(saved: Tensor, dy: Tensor, activation: Activation, *, from_output: bool) -> Tensor:
    """``dy`` times the derivative of the activation, from its output or its input; differentiable by both."""
    if not from_output:
        return torch.autograd.grad(activate(saved, activation), saved, dy, create_graph=True)[0]
    y, name, parameter = saved, activation.name, activation.parameter
    if name == "tanh":
        return dy * (1 - y * y)
    if name == "elu":
        return torch.where(y > 0, dy, dy * (y + parameter))
    if name == "identity":
        return dy
    # PyTorch's backward ops: their derivative by y is 0, where that of a formula in place of them would be an error
    if name == "relu":
        return torch.ops.aten.threshold_backward(dy, y, 0)
    if name == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(dy, y, parameter, True)
    raise NotImplementedError(name)


def loss_of_variances(var: Tensor, beta: Tensor | float, form: str) -> Tensor:
    """Loss of each unit from its sub-batch variances ``(K, *units)``."""
    if form == "ratio":
        ratio = var[0::2] / (var[1::2] + beta)
        return (1 - ratio).square().mean(0)
    vbar = var.mean(0)
    variation = (var - vbar).square().sum(0) / (var.shape[0] - 1)
    return variation if form == "variance" else variation / (vbar + beta).square()


def bounded_beta(beta: Tensor | float, beta_min: float) -> Tensor | float:
    """max(beta, beta_min), the beta that acts. Its gradient is the projected one: see :class:`LowerBound`."""
    if beta_min == NO_MINIMUM:
        return beta
    if not isinstance(beta, Tensor):
        return max(beta, beta_min)
    bound = LowerBound if torch.compiler.is_compiling() else LowerBoundInForwardMode
    return bound.apply(beta, beta_min)[0]


def projected_gradient(dbeta: Tensor, below: Tensor) -> Tensor:
    """``dbeta`` without what would push a beta below its bound further down; a NaN stays."""
    return torch.where(below & (dbeta >= 0), 0.0, dbeta)


def in_layout_of_gradient(x: Tensor) -> Tensor:
    """Return ``x`` such that its gradient has x's memory format. PyTorch's own is contiguous, or has dy's."""
    if not (torch.is_grad_enabled() and x.requires_grad) or has_transform(x, None):
        return x
    return LayoutOfGradient.apply(x)


class LayoutOfGradient(torch.autograd.Function):
    """The identity, with a gradient that has its input's strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.strides = dense_strides(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return with_strides(dx, ctx.strides)


class LowerBound(torch.autograd.Function):
    """max(beta, least), with a projected gradient: below the bound, only what raises beta passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(beta: Tensor, least: float) -> tuple[Tensor, Tensor]:
        """Return max(beta, least), and whether beta is below."""
        return beta.clamp(min=least), beta < least

    @staticmethod
    def setup_context(ctx: Any, _inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        """Save whether beta is below. Beta itself may be overwritten, which compiled code does not check."""
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (below,) = ctx.saved_tensors
        return projected_gradient(g, below), None


class LowerBoundInForwardMode(LowerBound):
    """The same with a derivative in forward mode, which Dynamo cannot trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        (below,) = ctx.saved_tensors
        return torch.where(below, 0.0, tangent), None

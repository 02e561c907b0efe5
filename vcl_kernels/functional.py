"""The public functions: check the arguments, choose the backend, hand over to autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import autograd, differentiable, ops, reference
from .backends import choose, interpreted_triton
from .checks import check_activation, check_loss, check_moments
from .geometry import in_layout
from .options import IDENTITY, NO_MINIMUM, Activation
from .transforms import has_transform

__all__ = ["sub_batch_moments", "vcl_activation", "vcl_loss"]


def vcl_loss(
    x: Tensor,
    beta: float | Tensor | None = None,
    *,
    sub_batch_size: int = 5,
    form: str = "ratio",
    unit: str = "channel",
    num_sub_batches: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Variance constancy loss: how much the variance of an activation differs between sub-batches.

    The batch is cut along its first dimension into K consecutive sub-batches of n = ``sub_batch_size`` samples;
    v_k is the unbiased variance of a unit over sub-batch k. Rows past K·n take no part and get a zero gradient.
    The loss of a unit:

    - ``"ratio"``: mean over pairs (a, b) = (0, 1), (2, 3), … of ``(1 - v_a / (v_b + beta))²``
    - ``"variance"``: ``V = Σ (v_k - v̄)² / (K - 1)``
    - ``"relative_variance"``: ``V / (v̄ + beta)²``

    Args:
        x: activations ``(N, C, *spatial)`` before their nonlinearity; float32, float64, bfloat16 or float16, N at
            least 2n. Any strides: contiguous, channels_last and sliced tensors are read where they lie.
        beta: guards variances near zero: a float, or a tensor of shape ``()``, ``(C,)`` for channel units or
            ``(C, *spatial)`` for activation units, in float32 (float64 for float64 x) or x's dtype. Default 1.0 for
            ``"ratio"``, 1e-5 for ``"relative_variance"``; ``"variance"`` takes none.
        sub_batch_size: n, samples in a sub-batch. Of Gaussian values with a variance far above beta, the ratio has a
            finite mean only for more than 5 values in a sub-batch of a unit.
        form: ``"ratio"`` (the paper's), ``"variance"`` or ``"relative_variance"``.
        unit: ``"channel"``: one statistic for each channel, over n·P values (P spatial positions);
            ``"activation"``: one for each (channel, position), over n values.
        num_sub_batches: K; default 2 for ``"ratio"``, all N // n for the others. An unpaired last sub-batch of
            ``"ratio"`` takes no part.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over units.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``, which then never falls back; None picks the fastest, and
            under ``torch.func`` transforms and in forward mode the reference.

    Returns:
        The loss, ``()`` or one for each unit, ``(C,)`` or ``(C, *spatial)``; float32 for bfloat16 and float16 x,
        else x's dtype. Differentiable by x and beta, twice; the gradient of x has its dtype and memory format.

    Raises:
        TypeError: x or beta is not a dense tensor (or float) of a supported dtype.
        ValueError: too few samples, fewer than two values in a sub-batch, a beta of another shape or device, an
            unknown form, unit, reduction or backend, or a beta for ``"variance"``.
        RuntimeError: a named backend cannot run here, or has kernels and a ``torch.func`` transform or a forward-mode
            derivative is taken.

    Source: Littwin & Wolf, "Regularizing by the Variance of the Activations' Sample-Variances", NeurIPS 2018.

    >>> import torch
    >>> x = torch.tensor([[1.0], [3.0], [2.0], [6.0]])  # variances 2 and 8
    >>> vcl_loss(x, 0.0, sub_batch_size=2)
    tensor(0.5625)
    """
    _, loss = weighted_activation(
        x,
        IDENTITY,
        beta,
        sub_batch_size=sub_batch_size,
        form=form,
        unit=unit,
        num_sub_batches=num_sub_batches,
        reduction=reduction,
        backend=backend,
    )
    return loss


def vcl_activation(
    x: Tensor,
    activation: str = "elu",
    beta: float | Tensor | None = None,
    *,
    alpha: float = 1.0,
    negative_slope: float = 0.01,
    approximate: str = "none",
    sub_batch_size: int = 5,
    form: str = "ratio",
    unit: str = "channel",
    num_sub_batches: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""An activation function and the variance constancy loss of its input, for the price of the activation.

    ``y = activation(x)`` and ``loss = vcl_loss(x, beta, …)``. Forward reads x once and writes y once, the statistics
    on the way; backward reads what the bare activation's does and adds the loss's gradient,
    ``dx = dy · activation'(x) + g · scale · (x - mean)``, before it writes dx.

    Saved for backward is one tensor of x's size, as by the bare activation. Where at most half of the rows take part,
    or one pair of sub-batches but not all rows (the paper's), and the derivative follows from y (relu, tanh, and elu
    and leaky_relu with a parameter of at least 0) that is y, which the next layer saves anyway, and the rows that take
    part; y must then not be modified in place. Else it is x. In half precision elu's derivative, y + alpha, has the
    rounding of y.

    Under ``torch.compile``, where at most a quarter of the rows take part, the activation is the compiler's, which
    fuses it with its neighbours; only those rows go through a kernel of their own.

    Args:
        x: activations ``(N, C, *spatial)`` before the nonlinearity, as for :func:`vcl_loss`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        beta: as for :func:`vcl_loss`.
        alpha: of ``"elu"``.
        negative_slope: of ``"leaky_relu"``.
        approximate: of ``"gelu"``: ``"none"`` or ``"tanh"``.
        sub_batch_size, form, unit, num_sub_batches, reduction, backend: as for :func:`vcl_loss`.

    Returns:
        ``(y, loss)``: y of x's shape and dtype; loss as by :func:`vcl_loss`. Both differentiable, twice.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`vcl_loss`; also for an unknown activation.

    Source: Littwin & Wolf, NeurIPS 2018, who put the loss before every activation function.

    >>> import torch
    >>> x = torch.tensor([[1.0], [3.0], [2.0], [-6.0]])
    >>> y, loss = vcl_activation(x, "relu", sub_batch_size=2)
    >>> y.flatten()
    tensor([1., 3., 2., 0.])
    """
    return weighted_activation(
        x,
        check_activation(activation, alpha, negative_slope, approximate),
        beta,
        sub_batch_size=sub_batch_size,
        form=form,
        unit=unit,
        num_sub_batches=num_sub_batches,
        reduction=reduction,
        backend=backend,
    )


def weighted_activation(
    x: Tensor,
    activation: Activation,
    beta: float | Tensor | None,
    *,
    sub_batch_size: int,
    form: str,
    unit: str,
    num_sub_batches: int | None,
    reduction: str,
    backend: str | None,
    weight: float = 1.0,
    beta_min: float = NO_MINIMUM,
    injection: autograd.Injection | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`vcl_activation` with ``weight`` times its loss, and beta acting as ``max(beta, beta_min)``.

    The weight is inside the kernels, so that the upstream gradient can stay 1 and backward has nothing to scale.
    With an ``injection`` the loss, detached, is in the graph of y.
    """
    beta, spec = check_loss(x, beta, sub_batch_size, form, unit, num_sub_batches, reduction, weight, beta_min)
    implementation = _implementation(x, beta, backend)
    if implementation is None:
        y, loss = reference.activation_and_loss(x, activation, beta, spec)
    else:
        seen = in_layout(x, spec.per_activation)
        if activation != IDENTITY:
            return differentiable.activation_and_loss(seen, activation, beta, spec, implementation, injection)
        y, loss = x, differentiable.loss(seen, beta, spec, implementation)
    return (y, loss) if injection is None else autograd.injected(y, loss, injection)


def sub_batch_moments(
    x: Tensor,
    sub_batch_size: int,
    *,
    unit: str = "channel",
    num_sub_batches: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean and unbiased variance of every unit in every sub-batch: the primitive that losses are made of.

    ``mean_k = Σ x / M`` and ``var_k = Σ (x - mean_k)² / (M - 1)`` over the M values of a unit in sub-batch k:
    M = n·P for channel units, n for activation units.

    Args:
        x: activations ``(N, C, *spatial)``; float32, float64, bfloat16 or float16.
        sub_batch_size: n, samples in a sub-batch.
        unit: ``"channel"`` or ``"activation"``, as for :func:`vcl_loss`.
        num_sub_batches: K; default all N // n.
        backend: as for :func:`vcl_loss`.

    Returns:
        ``(mean, var)``, each ``(K, C)`` or ``(K, C, *spatial)``; float32 for bfloat16 and float16 x, else x's
        dtype. Differentiable, twice.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`vcl_loss`.

    >>> import torch
    >>> sub_batch_moments(torch.tensor([[1.0], [3.0], [2.0], [6.0]]), 2)
    (tensor([[2.],
            [4.]]), tensor([[2.],
            [8.]]))
    """
    K, per_activation = check_moments(x, sub_batch_size, unit, num_sub_batches)
    implementation = _implementation(x, None, backend)
    if implementation is None:
        return reference.moments(reference.in_layout_of_gradient(x), sub_batch_size, K, per_activation)
    return differentiable.moments(in_layout(x, per_activation), sub_batch_size, K, per_activation, implementation)


def _implementation(x: Tensor, beta: Tensor | None, backend: str | None) -> Any:
    """Return the namespace of ops that serves ``x``, or None for the reference."""
    chosen = choose(backend, x)
    if chosen != "reference" and has_transform(x, beta):
        if backend is not None:
            raise RuntimeError(
                f"backend={backend!r} has no torch.func transforms and no forward-mode derivatives; backend=None and "
                'backend="reference" have them'
            )
        return None
    if chosen == "reference" or x.numel() == 0:
        return None
    if chosen == "triton" and x.device.type == "cpu":
        return interpreted_triton()
    return ops

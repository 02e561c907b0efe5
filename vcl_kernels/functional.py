"""The public functions: check the arguments, choose the backend, hand over to autograd."""

from __future__ import annotations

from torch import Tensor

from . import differentiable, ops, reference
from .autograd import ActivationSettings
from .backends import choose, triton_backend
from .backends.interface import Backend
from .checks import check_activation, check_loss, check_moments
from .geometry import in_layout
from .injection import Injection, injected
from .options import IDENTITY, Activation, ActivationName, Approximate, BackendName, Form, LossSpec, Reduction, Unit
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
    backend: BackendName | None = None,
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
    beta, spec = check_loss(x, beta, sub_batch_size, form, unit, num_sub_batches, reduction)
    return activation_and_loss(x, beta, spec, IDENTITY, backend)[1]


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
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    r"""An activation function and the variance constancy loss of its input, in one pass over x.

    ``y = activation(x)`` and ``loss = vcl_loss(x, beta, …)``. Forward reads x once and writes y once, the statistics
    on the way; backward reads what the bare activation's does and adds the loss's gradient,
    ``dx = dy · activation'(x) + g · scale · (x - mean)``, before it writes dx.

    Saved for backward is one tensor of x's size, as by the bare activation: x, or y and the rows that take part, where
    those are few (the paper's one pair, for example) and the derivative follows from y (relu, tanh, and elu and
    leaky_relu with a parameter of at least 0). The next layer saves y anyway; y must then not be modified in place. In
    half precision elu's derivative, y + alpha, has the rounding of y.

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
    beta, spec = check_loss(x, beta, sub_batch_size, form, unit, num_sub_batches, reduction)
    return activation_and_loss(x, beta, spec, check_activation(activation, alpha, negative_slope, approximate), backend)


def activation_and_loss(
    x: Tensor,
    beta: Tensor | None,
    spec: LossSpec,
    activation: Activation,
    backend: str | None,
    injection: Injection | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`vcl_activation` of checked arguments. With an ``injection`` the loss, detached, is in the graph of y."""
    implementation = _implementation(x, beta, backend)
    if implementation is None:
        y, loss = reference.activation_and_loss(x, activation, beta, spec)
    else:
        readable = in_layout(x, spec.per_activation)
        if activation != IDENTITY:
            settings = ActivationSettings(activation, spec, implementation, injection)
            return differentiable.activation_and_loss(readable, beta, settings)
        y, loss = x, differentiable.loss(readable, beta, spec, implementation)
    return (y, loss) if injection is None else injected(y, loss, injection)


def sub_batch_moments(
    x: Tensor,
    sub_batch_size: int,
    *,
    unit: Unit = "channel",
    num_sub_batches: int | None = None,
    backend: BackendName | None = None,
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
    sub_batches = check_moments(x, sub_batch_size, unit, num_sub_batches)
    implementation = _implementation(x, None, backend)
    if implementation is None:
        return reference.moments(reference.in_layout_of_gradient(x), sub_batches)
    return differentiable.moments(in_layout(x, sub_batches.per_activation), sub_batches, implementation)


def _implementation(x: Tensor, beta: Tensor | None, backend: str | None) -> Backend | None:
    """Return what serves ``x``, or None for the reference."""
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
        return triton_backend()
    return ops

"""The ops of ``vcl_kernels/ops.py`` as Triton launches, with the same names, arguments and results."""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry, accumulation_dtype, empty_rows, empty_units, in_layout, in_unit_order, with_strides
from ...options import ACTIVATIONS, FORMS, NO_MINIMUM
from . import apply, finalise, fused, multiply
from . import moments as partial_moments
from .launch import ROOM

_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def one_pass(x: Tensor, n: int, K: int, per_activation: bool) -> bool:
    """Whether a unit fits on chip."""
    return fused.fits(Geometry.of(x, n, K, per_activation), x.element_size())


def loss(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce) -> Tensor:
    """Loss alone."""
    x = in_layout(x, per_activation)
    beta = None if beta is None else in_unit_order(beta, x, per_activation)
    given = beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce
    partial = _moments(x, None, n, K, per_activation)
    return _coefficients(x, *partial, None, *given, False)[0]


def loss_dx(
    x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient: in one pass where a unit fits on chip."""
    x = in_layout(x, per_activation)
    beta = None if beta is None else in_unit_order(beta, x, per_activation)
    g = _seen(x, n, K, per_activation)
    if not fused.fits(g, x.element_size()):  # as it lies here: a compiler may have chosen after one_pass was asked
        given = beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce
        loss, mean, scale, by_beta, _ = loss_coefficients(x, *given, beta_grad, False)
        return loss, moments_dx(x, mean, scale, None, None, n, x.shape[0], per_activation), by_beta
    dx = empty_rows(x, x.shape[0])
    per_unit = empty_units(x, per_activation)
    dbeta = empty_units(x, per_activation) if beta_grad else None
    launch, shape = fused.plan(g, x.element_size())
    launch.constants.update(FORM=FORMS[form], BETA=_beta_kind(beta), ACC=_accumulation(x))
    launch(x, dx, per_unit, dbeta, beta, beta_value, beta_min, factor, *shape)
    if dbeta is not None and reduce and _beta_kind(beta) == 1:
        dbeta = _may_only_rise(_reduced(dbeta, True), beta, beta_min)
    return _reduced(per_unit, reduce), dx, _no_dbeta(x) if dbeta is None else dbeta


def loss_coefficients(
    x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad, keep_rows
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the mean and scale from which backward makes dx, and the rows that take part, from one read of them."""
    x = in_layout(x, per_activation)
    beta = None if beta is None else in_unit_order(beta, x, per_activation)
    rows = empty_rows(x, K * n) if keep_rows else None
    mean = empty_units(x, per_activation, K)
    partial = _moments(x, mean, n, K, per_activation, rows=rows)
    given = beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce
    return *_coefficients(x, *partial, mean, *given, beta_grad), x.new_empty(0) if rows is None else rows


def moments(x, n, K, per_activation) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each sub-batch."""
    x = in_layout(x, per_activation)
    mean, var = empty_units(x, per_activation, K), empty_units(x, per_activation, K)
    partial, splits = _moments(x, mean, n, K, per_activation)
    g = _seen(x, n, K, per_activation)
    launch, shape = finalise.plan(g, splits, reduce=False)
    launch.constants.update(FORM=None, BETA=0, ACC=_accumulation(x))
    launch(partial, mean, var, None, None, None, None, 0.0, 0.0, 1.0, *shape)
    return mean, var


def moments_dx(x, mean, scale, shift, g, n, N, per_activation) -> Tensor:
    """dx = g · (scale · (x - mean) + shift), and zeros for rows past the last sub-batch."""
    x = in_layout(x, per_activation)
    dx = empty_rows(x, N)
    _apply(x, None, None, dx, mean, scale, shift, g, n, mean.shape[0], per_activation)
    return dx


def activation(
    x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad, activation, parameter,
    keep_rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y = act(x), the loss and the coefficients of x, and the rows that take part, from one read of x."""
    x = in_layout(x, per_activation)
    beta = None if beta is None else in_unit_order(beta, x, per_activation)
    y = empty_rows(x, x.shape[0])
    rows = empty_rows(x, K * n) if keep_rows else None
    mean = empty_units(x, per_activation, K)
    partial = _moments(x, mean, n, K, per_activation, y, rows, ACTIVATIONS[activation], parameter)
    given = beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce
    return y, *_coefficients(x, *partial, mean, *given, beta_grad), x.new_empty(0) if rows is None else rows


def activation_dx(
    saved, from_output, rows, dy, mean, scale, g, n, N, per_activation, activation, parameter
) -> Tensor:  # fmt: skip
    """dx = dy · act' + g · scale · (x - mean), either term left out with its upstream gradient; rounded once."""
    if saved is None:
        rows = in_layout(rows, per_activation)
    else:
        saved = in_layout(saved, per_activation)
    if dy is not None and not (dy.shape[0] == N and (saved is None or saved.shape[0] == N)):
        raise ValueError(f"dy, dx and what was saved must have the same rows, got N = {N}")
    dx = empty_rows(rows if saved is None else saved, N)
    K = mean.shape[0]
    rows = None if rows is None else with_strides(rows, dx.stride())
    dy = None if dy is None else with_strides(dy, dx.stride())  # it may be expanded, or in another memory format
    if g is None:
        rows = mean = scale = None
    if rows is not None and dy is None:
        saved, rows = rows, None
    chosen = ACTIVATIONS[activation], parameter, from_output
    _apply(saved, rows, dy, dx, mean, scale, None, g, n, K, per_activation, *chosen)
    return dx


def multiply_(dx: Tensor, g: Tensor) -> None:
    """dx *= g, where dx is dense; nothing is read or written if g is 1."""
    launch, shape = multiply.plan(dx.numel())
    launch.constants.update(ACC=_accumulation(dx))
    launch(dx, g, *shape)


def _moments(x, mean, n, K, per_activation, y=None, rows=None, activation=None, parameter=0.0) -> tuple[Tensor, int]:
    """Σ (x - mean)² of each sub-batch, (K, U), with mean filled if given; y and rows are filled if given.

    Where sub-batches are split, what finalise makes both of. Also return how many parts each was split into.
    """
    g = _seen(x, n, K, per_activation)
    launch, shape, splits = partial_moments.plan(g, y is not None, x.element_size(), keeps=rows is not None)
    partial = torch.empty(partial_moments.partial_size(g, splits), dtype=torch.float64, device=x.device)
    launch.constants.update(ACTIVATION=activation, ACC=_accumulation(x))
    launch(x, y, rows, partial, mean, parameter, *shape)
    return partial, splits


def _coefficients(
    x, partial, splits, mean, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad
):  # fmt: skip
    """Loss, mean and (if there is a mean) scale, and dbeta, from what ``_moments`` found."""
    g = _seen(x, n, K, per_activation)
    scale = None if mean is None else torch.empty_like(mean)
    launch, shape = finalise.plan(g, splits, reduce)
    reduced = launch.constants["REDUCE"]
    reduce_dbeta = reduce and _beta_kind(beta) == 1
    loss = _empty_sum(x) if reduced else empty_units(x, per_activation)
    dbeta = None
    if beta_grad:
        dbeta = _empty_sum(x) if reduced and reduce_dbeta else empty_units(x, per_activation)
    launch.constants.update(FORM=FORMS[form], BETA=_beta_kind(beta), ACC=_accumulation(x))
    launch(partial, mean, None, scale, loss, dbeta, beta, beta_value, beta_min, factor, *shape)
    if not reduced:
        loss = _reduced(loss, reduce)
        dbeta = None if dbeta is None else _reduced(dbeta, reduce_dbeta)
    if dbeta is not None and reduce_dbeta:
        dbeta = _may_only_rise(dbeta, beta, beta_min)
    return loss, mean, scale, _no_dbeta(x) if dbeta is None else dbeta


def _apply(
    saved, rows, dy, dx, mean, scale, shift, g, n, K, per_activation,
    activation="identity", parameter=0.0, from_output=False,
) -> None:  # fmt: skip
    mean, scale, shift = (None if t is None else in_unit_order(t, dx, per_activation) for t in (mean, scale, shift))
    to = _seen(dx, n, K, per_activation)
    x = to if saved is None else _seen(saved, n, K, per_activation)
    launch, shape = apply.plan(x, to, dx.element_size())
    launch.constants.update(ACTIVATION=activation, FROM_OUTPUT=from_output, ACC=_accumulation(dx))
    launch(saved, rows, dy, dx, mean, scale, shift, g, parameter, *shape)


def _seen(x: Tensor, n: int, K: int, per_activation: bool) -> Geometry:
    return _of_shape(x.shape, x.stride(), n, K, per_activation)


@functools.lru_cache(maxsize=1024)
def _of_shape(shape: torch.Size, strides: tuple[int, ...], n: int, K: int, per_activation: bool) -> Geometry:
    if not 0 <= K * n <= shape[0]:
        raise ValueError(f"{K} sub-batches of {n} samples want more than the {shape[0]} rows of x")
    g = Geometry.of_shape(shape, strides, n, K, per_activation)
    if any(2**31 - ROOM <= size < 2**31 for size in (g.N, g.P, g.U, g.M)):
        raise ValueError(
            f"x has {g.N} rows, {g.U} units of {g.P} positions and {g.M} values of a unit in a sub-batch; "
            f"none of these may be among the last {ROOM} numbers below 2^31: the last tile would end past them"
        )
    return g


def _accumulation(x: Tensor):
    return _TRITON_DTYPE[accumulation_dtype(x.dtype)]


def _beta_kind(beta: Tensor | None) -> int:
    return 0 if beta is None else 1 if beta.dim() == 0 else 2


def _reduced(per_unit: Tensor, reduce: bool) -> Tensor:
    return per_unit.sum() if reduce else per_unit


def _may_only_rise(dbeta: Tensor, beta: Tensor, beta_min: float) -> Tensor:
    """Return the gradient of one beta, without what would lower it below beta_min: as kernels do for each unit's."""
    return dbeta if beta_min == NO_MINIMUM else torch.where((beta >= beta_min) | (dbeta < 0), dbeta, 0.0)


def _empty_sum(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=accumulation_dtype(x.dtype))


def _no_dbeta(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=accumulation_dtype(x.dtype))

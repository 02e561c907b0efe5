"""The functions of a ``Backend`` as Triton launches."""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry, accumulation_dtype, empty_rows, empty_units, in_layout, in_unit_order, with_strides
from ...options import FORMS, IDENTITY, NO_MINIMUM, LossSpec, SubBatches
from ..interface import Coefficients, Saved
from . import apply, finalise, fused, multiply
from . import moments as partial_moments
from .launch import ROOM

_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def one_pass(x: Tensor, spec: LossSpec) -> bool:
    """Whether a unit fits on chip."""
    return fused.fits(Geometry.of(x, spec), x.element_size())


def loss(x, beta, spec) -> Tensor:
    """Loss alone."""
    x = in_layout(x, spec.per_activation)
    partial, parts = _moments(x, spec.sub_batches)
    return _loss(x, beta, spec, partial, parts, False)[0]


def loss_dx(x: Tensor, beta, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient: in one pass where a unit fits on chip."""
    x = in_layout(x, spec.per_activation)
    if not one_pass(x, spec):  # as x lies here: a compiler may have chosen after one_pass was asked
        loss, coefficients, by_beta, _ = loss_coefficients(x, beta, spec, beta_grad, False)
        return loss, moments_dx(x, coefficients, None, spec.sub_batches, x.shape[0]), by_beta
    beta = None if beta is None else in_unit_order(beta, x, spec.per_activation)
    dx = empty_rows(x, x.shape[0])
    per_unit = empty_units(x, spec.per_activation)
    dbeta: Tensor | None = empty_units(x, spec.per_activation) if beta_grad else None
    launch, shape = fused.plan(_geometry(x, spec), x.element_size())
    launch.constants.update(FORM=FORMS[spec.form], BETA=_beta_kind(beta), ACC=_accumulation(x))
    launch(x, dx, per_unit, dbeta, beta, spec.beta_value, spec.beta_min, spec.factor, *shape)
    if dbeta is not None and spec.reduce and _beta_kind(beta) == 1:
        dbeta = _may_only_rise(_reduced(dbeta, True), beta, spec.beta_min)
    return _reduced(per_unit, spec.reduce), dx, _no_dbeta(x) if dbeta is None else dbeta


def loss_coefficients(x, beta, spec, beta_grad, keep_rows) -> tuple[Tensor, Coefficients, Tensor, Tensor]:
    """Loss, the coefficients from which backward makes dx, and the rows that take part, from one read of them."""
    x = in_layout(x, spec.per_activation)
    rows = empty_rows(x, spec.K * spec.n) if keep_rows else None
    mean = empty_units(x, spec.per_activation, spec.K)
    partial, parts = _moments(x, spec.sub_batches, mean, rows=rows)
    loss, scale, dbeta = _loss(x, beta, spec, partial, parts, beta_grad, mean)
    return loss, Coefficients(mean, scale), dbeta, x.new_empty(0) if rows is None else rows


def moments(x, sub_batches) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each sub-batch."""
    per_activation = sub_batches.per_activation
    x = in_layout(x, per_activation)
    mean, var = (empty_units(x, per_activation, sub_batches.K) for _ in range(2))
    partial, parts = _moments(x, sub_batches, mean)
    launch, shape = finalise.plan(_geometry(x, sub_batches), parts, reduce=False)
    launch.constants.update(FORM=None, BETA=0, ACC=_accumulation(x))
    launch(partial, mean, var, None, None, None, None, 0.0, 0.0, 1.0, *shape)
    return mean, var


def moments_dx(x, coefficients, g, sub_batches, N) -> Tensor:
    """dx = g · (scale · (x - mean) + shift), and zeros for rows past the last sub-batch."""
    return _dx(Saved(x), None, coefficients, g, IDENTITY, sub_batches, N)


def activation(x, beta, spec, activation, beta_grad, keep_rows) -> tuple[Tensor, Tensor, Coefficients, Tensor, Tensor]:
    """y = act(x), the loss and the coefficients of x, and the rows that take part, from one read of x."""
    x = in_layout(x, spec.per_activation)
    y = empty_rows(x, x.shape[0])
    rows = empty_rows(x, spec.K * spec.n) if keep_rows else None
    mean = empty_units(x, spec.per_activation, spec.K)
    partial, parts = _moments(x, spec.sub_batches, mean, y, rows, activation)
    loss, scale, dbeta = _loss(x, beta, spec, partial, parts, beta_grad, mean)
    return y, loss, Coefficients(mean, scale), dbeta, x.new_empty(0) if rows is None else rows


def multiply_(dx: Tensor, g: Tensor) -> None:
    """dx *= g, where dx is dense; nothing is read or written if g is 1."""
    launch, shape = multiply.plan(dx.numel())
    launch.constants.update(ACC=_accumulation(dx))
    launch(dx, g, *shape)


def _moments(x, sub_batches, mean=None, y=None, rows=None, activation=None) -> tuple[Tensor, int]:
    """Σ (x - mean)² of each sub-batch, (K, U), with mean filled if given; y and rows are filled if given.

    Where sub-batches are split, what finalise makes both of. Also return how many parts each was split into.
    """
    g = _geometry(x, sub_batches)
    launch, shape, splits = partial_moments.plan(g, y is not None, x.element_size(), keeps=rows is not None)
    partial = torch.empty(partial_moments.partial_size(g, splits), dtype=torch.float64, device=x.device)
    name, parameter = (None, 0.0) if activation is None else (activation.name, activation.parameter)
    launch.constants.update(ACTIVATION=name, ACC=_accumulation(x))
    launch(x, y, rows, partial, mean, parameter, *shape)
    return partial, splits


def _loss(x, beta, spec, partial, splits, beta_grad, mean=None):
    """Loss, scale if there is a mean, and dbeta, from what ``_moments`` found."""
    per_activation, reduce = spec.per_activation, spec.reduce
    beta = None if beta is None else in_unit_order(beta, x, per_activation)
    scale = None if mean is None else torch.empty_like(mean)
    launch, shape = finalise.plan(_geometry(x, spec), splits, reduce)
    reduced = launch.constants["REDUCE"]
    reduce_dbeta = reduce and _beta_kind(beta) == 1
    loss = _empty_sum(x) if reduced else empty_units(x, per_activation)
    dbeta = None
    if beta_grad:
        dbeta = _empty_sum(x) if reduced and reduce_dbeta else empty_units(x, per_activation)
    launch.constants.update(FORM=FORMS[spec.form], BETA=_beta_kind(beta), ACC=_accumulation(x))
    launch(partial, mean, None, scale, loss, dbeta, beta, spec.beta_value, spec.beta_min, spec.factor, *shape)
    if not reduced:
        loss = _reduced(loss, reduce)
        dbeta = None if dbeta is None else _reduced(dbeta, reduce_dbeta)
    if dbeta is not None and reduce_dbeta:
        dbeta = _may_only_rise(dbeta, beta, spec.beta_min)
    return loss, scale, _no_dbeta(x) if dbeta is None else dbeta


def activation_dx(saved, dy, coefficients, g, activation, sub_batches, N) -> Tensor:
    """dx = dy · act' + g · scale · (x - mean), a term without its upstream gradient left out; rounded once."""
    if g is None:
        saved, coefficients = saved._replace(rows=None), (None, None, None)
    return _dx(saved, dy, coefficients, g, activation, sub_batches, N)


def _dx(saved, dy, coefficients, g, activation, sub_batches, N) -> Tensor:
    per_activation = sub_batches.per_activation
    tensor, rows, from_output = saved
    like = in_layout(rows if tensor is None else tensor, per_activation)
    if dy is not None and not (dy.shape[0] == N and (tensor is None or tensor.shape[0] == N)):
        raise ValueError(f"dy, dx and what was saved must have the same rows, got N = {N}")
    dx = empty_rows(like, N)
    tensor = None if tensor is None else like
    rows = None if rows is None else with_strides(rows, dx.stride())
    dy = None if dy is None else with_strides(dy, dx.stride())  # it may be expanded, or in another memory format
    if rows is not None and dy is None:
        tensor, rows = rows, None
    mean, scale, shift = (None if t is None else in_unit_order(t, dx, per_activation) for t in coefficients)
    to = _geometry(dx, sub_batches)
    launch, shape = apply.plan(to if tensor is None else _geometry(tensor, sub_batches), to, dx.element_size())
    launch.constants.update(ACTIVATION=activation.name, FROM_OUTPUT=from_output, ACC=_accumulation(dx))
    launch(tensor, rows, dy, dx, mean, scale, shift, g, activation.parameter, *shape)
    return dx


def _geometry(x: Tensor, cut: SubBatches | LossSpec) -> Geometry:
    return _of_shape(x.shape, x.stride(), cut.n, cut.K, cut.per_activation)


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

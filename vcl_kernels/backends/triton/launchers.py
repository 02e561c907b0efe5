"""The ops of ``vcl_kernels/ops.py`` as Triton launches, with the same names, arguments and results."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry, empty_rows, unit_shape, unit_strides
from . import apply, finalise, fused, multiply
from . import moments as partial_moments

_ACCUMULATION = {torch.float64: tl.float64}


def one_pass(x: Tensor, n: int, K: int, per_activation: bool) -> bool:
    """Whether a unit fits on chip."""
    return fused.fits(Geometry.of(x, n, K, per_activation), x.element_size())


def loss(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce) -> Tensor:
    """Loss alone."""
    spec = beta_value, beta_min, n, K, form, per_activation, factor, reduce
    return _deferred(x, beta, *spec, False, want_coefficients=False)[0]


def loss_dx(
    x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient in one pass, for units that fit on chip."""
    g, dx = Geometry.of(x, n, K, per_activation), torch.empty_like(x)
    to = Geometry.of(dx, n, K, per_activation)
    per_unit = _units(x, per_activation)
    dbeta = _units(x, per_activation) if beta_grad else None
    launch = fused.plan(g, to, x.element_size())
    launch.constants.update(FORM=form, BETA=_beta_kind(beta), DBETA=beta_grad, ACC=_accumulation(x))
    launch(x, dx, per_unit, dbeta, beta, beta_value, beta_min, factor, *fused.arguments(g, to))
    return _reduced(per_unit, reduce), dx, _reduced_dbeta(x, beta, dbeta, reduce)


def loss_coefficients(
    x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the mean and scale from which backward makes dx."""
    spec = beta_value, beta_min, n, K, form, per_activation, factor, reduce
    return _deferred(x, beta, *spec, beta_grad, want_coefficients=True)


def moments(x, n, K, per_activation) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each sub-batch."""
    mean, var = _units(x, per_activation, K), _units(x, per_activation, K)
    _finalise(x, n, K, per_activation, mean=mean, var=var)
    return mean, var


def moments_dx(x, mean, scale, shift, n, rows, per_activation) -> Tensor:
    """dx = scale · (x - mean) + shift, and zeros for rows past the last sub-batch."""
    dx = empty_rows(x, rows)
    g = Geometry.of(x, n, mean.shape[0], per_activation)
    to = Geometry.of(dx, n, mean.shape[0], per_activation)
    launch = apply.plan(g, to, x.element_size())
    launch.constants.update(SHIFT=shift is not None, ACC=_accumulation(x))
    launch(x, dx, mean, scale, shift, *apply.arguments(g, to))
    return dx


def multiply_(dx: Tensor, g: Tensor) -> None:
    """dx *= g, where dx is dense; nothing is read or written if g is 1."""
    launch = multiply.plan(dx.numel())
    launch.constants.update(ACC=_accumulation(dx))
    launch(dx, g, dx.numel())


def _deferred(
    x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad, *, want_coefficients
):
    mean = _units(x, per_activation, K) if want_coefficients else None
    scale = _units(x, per_activation, K) if want_coefficients else None
    per_unit = _units(x, per_activation)
    dbeta = _units(x, per_activation) if beta_grad else None
    _finalise(x, n, K, per_activation, mean, None, scale, per_unit, dbeta, beta, beta_value, beta_min, factor, form)
    return _reduced(per_unit, reduce), mean, scale, _reduced_dbeta(x, beta, dbeta, reduce)


def _finalise(
    x, n, K, per_activation, mean=None, var=None, scale=None, per_unit=None, dbeta=None, beta=None,
    beta_value=0.0, beta_min=0.0, factor=1.0, form=-1,
):  # fmt: skip
    g, acc = Geometry.of(x, n, K, per_activation), _accumulation(x)
    launch, splits, per_split = partial_moments.plan(g, x.element_size())
    partial = torch.empty((4, splits, K, g.U), dtype=torch.float64, device=x.device)
    launch.constants.update(ACC=acc)
    launch(x, partial, *partial_moments.arguments(g, splits, per_split))
    launch = finalise.plan(g)
    launch.constants.update(
        FORM=form, BETA=_beta_kind(beta), MEAN=mean is not None, SCALE=scale is not None, DBETA=dbeta is not None,
        ACC=acc,
    )  # fmt: skip
    results = mean, var, scale, per_unit, dbeta
    launch(partial, *results, beta, beta_value, beta_min, factor, *finalise.arguments(g, splits))


def _accumulation(x: Tensor):
    return _ACCUMULATION.get(x.dtype, tl.float32)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _beta_kind(beta: Tensor | None) -> int:
    return 0 if beta is None else 1 if beta.dim() == 0 else 2


def _units(x: Tensor, per_activation: bool, K: int | None = None) -> Tensor:
    """Return an empty value for each unit, and each sub-batch with K, in x's order of units."""
    shape, strides = unit_shape(x, per_activation), unit_strides(x, per_activation)
    if K is not None:
        shape, strides = (K, *shape), (torch.Size(shape).numel(), *strides)
    return torch.empty_strided(shape, strides, dtype=_dtype(x), device=x.device)


def _reduced(per_unit: Tensor, reduce: bool) -> Tensor:
    return per_unit.sum(dtype=torch.float64).to(per_unit.dtype) if reduce else per_unit


def _reduced_dbeta(x: Tensor, beta: Tensor | None, dbeta: Tensor | None, reduce: bool) -> Tensor:
    if dbeta is None:
        return torch.empty(0, dtype=_dtype(x), device=x.device)
    return _reduced(dbeta, reduce and beta is not None and beta.dim() == 0)

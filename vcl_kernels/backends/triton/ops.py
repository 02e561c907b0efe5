"""The functions of a ``Backend`` as Triton launches."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry, accumulation_dtype, empty_rows, empty_units, in_layout, in_unit_order, with_strides
from ...options import IDENTITY, NO_MINIMUM, LossSpec, SubBatches
from ...reference import projected_gradient
from ..interface import Coefficients, Saved
from . import backward, finalise, multiply, one_pass
from . import moments as moments_kernel
from .launch import ROOM


def takes_one_pass(x: Tensor, spec: LossSpec) -> bool:
    """Whether a unit fits on chip."""
    return one_pass.fits(_geometry(x, spec), x.element_size())


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec) -> Tensor:
    """Loss alone."""
    x = in_layout(x, spec.per_activation)
    return _loss(x, beta, spec, *_moments(x, spec.sub_batches), None, False)[0]


def loss_dx(x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient: in one pass where a unit fits on chip."""
    x = in_layout(x, spec.per_activation)
    if not takes_one_pass(x, spec):  # as x lies here: a compiler may have chosen after takes_one_pass was asked
        loss, coefficients, by_beta, _ = loss_coefficients(x, beta, spec, beta_grad, False)
        return loss, moments_dx(x, coefficients, None, spec.sub_batches, x.shape[0]), by_beta
    beta = None if beta is None else in_unit_order(beta, x, spec.per_activation)
    dx, loss = empty_rows(x, x.shape[0]), empty_units(x, spec.per_activation)
    dbeta: Tensor | None = torch.empty_like(loss) if beta_grad else None
    launch = one_pass.plan(_geometry(x, spec), x.element_size()).of(**_loss_constants(x, beta, spec))
    launch(one_pass.Tensors(x, dx, loss, dbeta, beta), spec.beta_value, spec.beta_min, spec.factor)
    loss, by_beta = _reduced(loss, dbeta, beta, spec)
    return loss, dx, by_beta


def loss_coefficients(x, beta, spec, beta_grad, keep_rows) -> tuple[Tensor, Coefficients, Tensor, Tensor]:
    """Loss, the coefficients from which backward makes dx, and the rows that take part, from one read of them."""
    return activation(x, beta, spec, None, beta_grad, keep_rows)[1:]


def activation(x, beta, spec, activation, beta_grad, keep_rows) -> tuple[Any, Tensor, Coefficients, Tensor, Tensor]:
    """y = activation(x), the loss and the coefficients of x, and the rows that take part, from one read of x.

    Without an activation y is None.
    """
    x = in_layout(x, spec.per_activation)
    y = None if activation is None else empty_rows(x, x.shape[0])
    rows = empty_rows(x, spec.K * spec.n) if keep_rows else None
    mean = empty_units(x, spec.per_activation, spec.K)
    partial, parts = _moments(x, spec.sub_batches, mean, y, rows, activation)
    loss, scale, dbeta = _loss(x, beta, spec, partial, parts, mean, beta_grad)
    return y, loss, Coefficients(mean, scale), dbeta, x.new_empty(0) if rows is None else rows


def moments(x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each sub-batch."""
    x = in_layout(x, sub_batches.per_activation)
    mean, var = (empty_units(x, sub_batches.per_activation, sub_batches.K) for _ in range(2))
    partial, parts = _moments(x, sub_batches, mean)
    launch = finalise.plan(_geometry(x, sub_batches), parts, reduce=False)
    launch = launch.of(FORM=None, BETA="number", ACC=_accumulation(x))
    launch(finalise.Tensors(partial, mean, var, None, None, None, None), 0.0, 0.0, 1.0)
    return mean, var


def moments_dx(x: Tensor, coefficients: Coefficients, g: Tensor | None, sub_batches: SubBatches, N: int) -> Tensor:
    """dx = g · (scale · (x - mean) + shift), and zeros for rows past the last sub-batch."""
    return _dx(Saved(x), None, coefficients, g, IDENTITY, sub_batches, N)


def activation_dx(saved, dy, coefficients, g, activation, sub_batches, N) -> Tensor:
    """dx = dy · activation' + g · scale · (x - mean), a term without its upstream gradient left out; rounded once."""
    if g is None:
        saved, coefficients = saved._replace(rows=None), (None, None, None)
    return _dx(saved, dy, coefficients, g, activation, sub_batches, N)


def _dx(saved, dy, coefficients, g, activation, sub_batches, N) -> Tensor:
    per_activation = sub_batches.per_activation
    tensor, rows, from_output = saved
    tensor = in_layout(tensor, per_activation)
    if dy is not None and not dy.shape[0] == tensor.shape[0] == N:
        raise ValueError(f"dy, dx and what was saved must have the same rows, got N = {N}")
    dx = empty_rows(tensor, N)
    rows = None if rows is None else with_strides(rows, dx.stride())
    dy = None if dy is None else with_strides(dy, dx.stride())  # it may be expanded, or in another memory format
    if rows is not None and dy is None:
        tensor, rows = rows, None
    mean, scale, shift = (None if t is None else in_unit_order(t, dx, per_activation) for t in coefficients)
    # Shape of dx, strides of what is read, which may have fewer rows
    geometry = _of_shape(dx.shape, tensor.stride(), sub_batches.n, sub_batches.K, per_activation)
    constants = {"ACTIVATION": activation.name, "FROM_OUTPUT": from_output, "ACC": _accumulation(dx)}
    launch = backward.plan(geometry, dx.element_size()).of(**constants)
    launch(backward.Tensors(tensor, rows, dy, dx, mean, scale, shift, g), activation.parameter)
    return dx


def multiply_(dx: Tensor, g: Tensor) -> None:
    """dx *= g, where dx is dense; nothing is read or written if g is 1."""
    multiply.plan(dx.numel()).of(ACC=_accumulation(dx))(multiply.Tensors(dx, g))


def _moments(x, sub_batches, mean=None, y=None, rows=None, activation=None) -> tuple[Tensor, int]:
    """Launch ``moments``; return ``partial`` and the number of parts. mean, y and rows are filled if given.

    Without parts ``partial`` is m2. With parts finalise computes m2 and fills the mean.
    """
    g = _geometry(x, sub_batches)
    launch = moments_kernel.plan(g, x.element_size(), activates=y is not None, keep_rows=rows is not None)
    parts = launch.sizes["parts"]
    partial = torch.empty(moments_kernel.partial_size(g, parts), dtype=torch.float64, device=x.device)
    name, parameter = (None, 0.0) if activation is None else (activation.name, activation.parameter)
    launch = launch.of(ACTIVATION=name, ACC=_accumulation(x))
    launch(moments_kernel.Tensors(x, y, rows, partial, mean), parameter)
    return partial, parts


def _loss(x, beta, spec, partial, parts, mean, beta_grad) -> tuple[Tensor, Any, Tensor]:
    """Loss, scale if there is a mean, and dbeta, from what ``_moments`` found."""
    beta = None if beta is None else in_unit_order(beta, x, spec.per_activation)
    launch = finalise.plan(_geometry(x, spec), parts, spec.reduce).of(**_loss_constants(x, beta, spec))

    def empty(one_value: bool) -> Tensor:
        if one_value and launch.constants["REDUCE"]:
            return x.new_empty((), dtype=accumulation_dtype(x.dtype))
        return empty_units(x, spec.per_activation)

    loss, dbeta = empty(True), empty(launch.constants["BETA"] == "one") if beta_grad else None
    scale = None if mean is None else torch.empty_like(mean)
    tensors = finalise.Tensors(partial, mean, None, scale, loss, dbeta, beta)
    launch(tensors, spec.beta_value, spec.beta_min, spec.factor)
    loss, dbeta = _reduced(loss, dbeta, beta, spec)
    return loss, scale, dbeta


def _loss_constants(x: Tensor, beta: Tensor | None, spec: LossSpec) -> dict[str, Any]:
    values = "number" if beta is None else "one" if beta.dim() == 0 else "each"
    return {"FORM": spec.form_name, "BETA": values, "ACC": _accumulation(x)}


def _reduced(loss: Tensor, dbeta: Tensor | None, beta: Tensor | None, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """Sum over units, unless the kernel has; and project the gradient of one beta, as kernels do for each unit's."""
    if spec.reduce and dbeta is not None and beta is not None and beta.dim() == 0:
        dbeta = dbeta.sum() if dbeta.dim() else dbeta
        if spec.beta_min != NO_MINIMUM:
            dbeta = projected_gradient(dbeta, beta < spec.beta_min)
    return loss.sum() if spec.reduce and loss.dim() else loss, loss.new_empty(0) if dbeta is None else dbeta


def _geometry(x: Tensor, sub_batches: SubBatches | LossSpec) -> Geometry:
    return _of_shape(x.shape, x.stride(), sub_batches.n, sub_batches.K, sub_batches.per_activation)


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


def _accumulation(x: Tensor) -> tl.dtype:
    return tl.float64 if accumulation_dtype(x.dtype) == torch.float64 else tl.float32

"""A ``Backend`` of fake tensors: shapes, dtypes and strides of results, and no values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import accumulation_dtype, empty_rows, empty_units, in_layout
from ..options import Activation, LossSpec, SubBatches
from .interface import Coefficients, Saved


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec) -> Tensor:
    return _loss_and_dbeta(in_layout(x, spec.per_activation), beta, spec, False)[0]


def loss_dx(x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = in_layout(x, spec.per_activation)
    loss, dbeta = _loss_and_dbeta(x, beta, spec, beta_grad)
    return loss, empty_rows(x, x.shape[0]), dbeta


def loss_coefficients(
    x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool, keep_rows: bool
) -> tuple[Tensor, Coefficients, Tensor, Tensor]:
    x = in_layout(x, spec.per_activation)
    loss, dbeta = _loss_and_dbeta(x, beta, spec, beta_grad)
    rows = empty_rows(x, spec.K * spec.n) if keep_rows else x.new_empty(0)
    return loss, Coefficients(*moments(x, spec.sub_batches)), dbeta, rows


def activation(
    x: Tensor, beta: Tensor | None, spec: LossSpec, _activation: Activation, beta_grad: bool, keep_rows: bool
) -> tuple[Tensor, Tensor, Coefficients, Tensor, Tensor]:
    y = empty_rows(in_layout(x, spec.per_activation), x.shape[0])
    return y, *loss_coefficients(x, beta, spec, beta_grad, keep_rows)


def activation_dx(
    saved: Saved,
    _dy: Tensor | None,
    _coefficients: Coefficients,
    _g: Tensor | None,
    _activation: Activation,
    sub_batches: SubBatches,
    N: int,
) -> Tensor:
    return empty_rows(in_layout(saved.tensor, sub_batches.per_activation), N)


def moments(x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
    _, K, per_activation = sub_batches
    x = in_layout(x, per_activation)
    return empty_units(x, per_activation, K), empty_units(x, per_activation, K)


def moments_dx(x: Tensor, _coefficients: Coefficients, _g: Tensor | None, sub_batches: SubBatches, N: int) -> Tensor:
    return empty_rows(in_layout(x, sub_batches.per_activation), N)


def multiply_(_dx: Tensor, _g: Tensor) -> None:
    pass


def _loss_and_dbeta(x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor]:
    per_activation = spec.per_activation
    one = x.new_empty((), dtype=accumulation_dtype(x.dtype))
    loss = one if spec.reduce else empty_units(x, per_activation)
    if beta is None or not beta_grad:
        return loss, one.new_empty(0)
    return loss, torch.empty_like(one) if spec.reduce and beta.dim() == 0 else empty_units(x, per_activation)

"""How a tensor is seen: the one description of shape and memory that kernels work from.

Kernels see ``(N, C, *spatial)`` as ``[row, unit, position]``. For channel units U = C, and P is the product of the
spatial sizes; for activation units U = C · P, and P = 1. There are two layouts: *spatial*, where a unit's positions are
contiguous (NCHW), and *unit*, where neighbouring units are (2-D, channels_last, and activation units, which are taken
in memory order).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .options import LossSpec, SubBatches


class Geometry(NamedTuple):
    """Shape and strides of x as ``[row, unit, position]``, with K sub-batches of n rows."""

    N: int
    K: int
    n: int
    U: int
    P: int
    spatial: bool
    row_stride: int
    unit_stride: int
    pos_stride: int

    @classmethod
    def of(cls, x: Tensor, sub_batches: SubBatches | LossSpec) -> Geometry:
        """Return the geometry of ``x``, which comes from ``in_layout``."""
        return cls.of_shape(x.shape, x.stride(), sub_batches.n, sub_batches.K, sub_batches.per_activation)

    @classmethod
    def of_shape(cls, shape: torch.Size, strides: tuple[int, ...], n: int, K: int, per_activation: bool) -> Geometry:
        """Return the geometry of a tensor of this shape and these strides."""
        P = math.prod(shape[2:])
        if per_activation:
            return cls(shape[0], K, n, shape[1] * P, 1, False, strides[0], 1, 1)
        pos_stride = _position_stride(shape, strides)
        return cls(shape[0], K, n, shape[1], P, P > 1 and pos_stride == 1, strides[0], strides[1], pos_stride)

    @property
    def M(self) -> int:
        """Values in one sub-batch of one unit."""
        return self.n * self.P


def _position_stride(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Return the distance of neighbouring positions, whatever the order of the spatial dimensions."""
    steps = [d for s, d in zip(shape[2:], strides[2:], strict=True) if s > 1]
    return min(steps) if steps else 1


def _fills(shape: torch.Size, strides: tuple[int, ...], step: int) -> bool:
    """Whether the dimensions, in some order, lie as one dimension of stride ``step`` would."""
    wanted = step * math.prod(shape)
    for _ in shape:
        for size, stride in zip(shape, strides, strict=True):
            if size > 1 and stride == step:
                step = step * size
    return step == wanted


def in_layout(x: Tensor, per_activation: bool) -> Tensor:
    """Return ``x``, or a contiguous copy if its strides fit neither layout (every second column, overlaps)."""
    if x.is_contiguous():
        return x
    if per_activation:
        return x if _fills(x.shape[1:], x.stride()[1:], 1) else x.contiguous()
    step, C, P = _position_stride(x.shape, x.stride()), x.shape[1], math.prod(x.shape[2:])
    if step == 0 or not _fills(x.shape[2:], x.stride()[2:], step):  # expanded, or with gaps
        return x.contiguous()
    spatial = step == 1 and P > 1 and (C == 1 or x.stride(1) >= P)
    unit = C == 1 or (x.stride(1) == 1 and (P == 1 or step >= C))
    return x if spatial or unit else x.contiguous()


def unit_shape(shape: torch.Size, per_activation: bool) -> tuple[int, ...]:
    """Return the shape of a value for each unit of x of ``shape``."""
    return tuple(shape[1:]) if per_activation else (shape[1],)


def unit_strides(x: Tensor, per_activation: bool) -> tuple[int, ...]:
    """Return the strides that lay out a value for each unit as x lays out its units."""
    return tuple(x.stride()[1:]) if per_activation else (1,)


def in_unit_order(t: Tensor, x: Tensor, per_activation: bool) -> Tensor:
    """Return ``t``, of shape ``()``, units or ``(K, *units)``, with its units laid out as those of x."""
    if t.dim() == 0:
        return t
    units = unit_shape(x.shape, per_activation)
    if t.shape[-len(units) :] != units:
        raise ValueError(f"a tensor of one value for each unit of shape {units} has shape {tuple(t.shape)}")
    if not per_activation and t.is_contiguous():
        return t
    strides = unit_strides(x, per_activation)
    if t.dim() > len(strides):
        strides = (math.prod(t.shape[1:]), *strides)
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of ``dtype``, and of losses and betas."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_units(x: Tensor, per_activation: bool, K: int | None = None) -> Tensor:
    """Return an empty tensor of shape units, or with K ``(K, *units)``, with its units laid out as those of x."""
    shape, strides = unit_shape(x.shape, per_activation), unit_strides(x, per_activation)
    if not per_activation or x.is_contiguous():
        return x.new_empty(shape if K is None else (K, *shape), dtype=accumulation_dtype(x.dtype))
    if K is not None:
        shape, strides = (K, *shape), (math.prod(shape), *strides)
    return x.new_empty_strided(shape, strides, dtype=accumulation_dtype(x.dtype))


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of x's gradient: rows one after another, each laid out as a row of x."""
    inner = x.stride()[1:]
    if not _fills(x.shape[1:], inner, 1):
        inner = torch.empty_like(x[:1]).stride()[1:]
    return (math.prod(x.shape[1:]), *inner)


def empty_rows(x: Tensor, rows: int) -> Tensor:
    """Return an empty tensor of ``rows`` rows, one after another, each laid out as a row of x."""
    if x.is_contiguous():
        return x.new_empty((rows, *x.shape[1:]))
    return x.new_empty_strided((rows, *x.shape[1:]), dense_strides(x))


def with_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return ``t``, or a (differentiable) copy with those strides."""
    if all(a == b for size, a, b in zip(t.shape, t.stride(), strides, strict=True) if size > 1):
        return t
    return t.new_empty_strided(t.shape, strides).copy_(t)

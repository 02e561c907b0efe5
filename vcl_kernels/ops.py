"""The registered ops: their schemas, what they return for fake tensors, and the backend that each device gets.

Every function here takes tensors in a supported layout (``geometry.in_layout``) and values of a ``LossSpec``.
``mean``, ``var``, ``scale`` and ``shift`` are ``(K, *units)`` in the accumulation dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import geometry
from .backends import load_native, one_pass, register_triton

__all__ = ["loss", "loss_coefficients", "loss_dx", "moments", "moments_dx", "multiply_", "one_pass"]

_SPEC = "float beta_value, float beta_min, int n, int K, int form, bool per_activation, float factor, bool reduce"
_SPEC = _SPEC.replace("int n, int K", "SymInt n, SymInt K")

_library = torch.library.Library("vcl_kernels", "DEF")
_library.define(f"loss(Tensor x, Tensor? beta, {_SPEC}) -> Tensor")
_library.define(f"loss_dx(Tensor x, Tensor? beta, {_SPEC}, bool beta_grad) -> (Tensor loss, Tensor dx, Tensor dbeta)")
_library.define(
    f"loss_coefficients(Tensor x, Tensor? beta, {_SPEC}, bool beta_grad) "
    "-> (Tensor loss, Tensor mean, Tensor scale, Tensor dbeta)"
)
_library.define("moments(Tensor x, SymInt n, SymInt K, bool per_activation) -> (Tensor mean, Tensor var)")
_library.define(
    "moments_dx(Tensor x, Tensor mean, Tensor scale, Tensor? shift, SymInt n, SymInt rows, bool per_activation) "
    "-> Tensor"
)
_library.define("multiply_(Tensor(a!) dx, Tensor g) -> ()")

load_native()
register_triton(_library)

# What autograd calls. A triton backend under the interpreter has functions of the same names.
loss = torch.ops.vcl_kernels.loss.default
loss_dx = torch.ops.vcl_kernels.loss_dx.default
loss_coefficients = torch.ops.vcl_kernels.loss_coefficients.default
moments = torch.ops.vcl_kernels.moments.default
moments_dx = torch.ops.vcl_kernels.moments_dx.default
multiply_ = torch.ops.vcl_kernels.multiply_.default


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _units(x: Tensor, per_activation: bool, K: int | None = None) -> Tensor:
    shape, strides = geometry.unit_shape(x, per_activation), geometry.unit_strides(x, per_activation)
    if K is not None:
        size = 1
        for s in shape:
            size = size * s
        shape, strides = (K, *shape), (size, *strides)
    return x.new_empty_strided(shape, strides, dtype=_accumulation(x))


def _loss_and_dbeta(x, beta, per_activation, reduce, beta_grad):  # type: ignore[no-untyped-def]
    loss = x.new_empty((), dtype=_accumulation(x)) if reduce else _units(x, per_activation)
    if not beta_grad:
        return loss, x.new_empty(0, dtype=_accumulation(x))
    return loss, torch.empty_like(loss) if reduce and beta.dim() == 0 else _units(x, per_activation)


@torch.library.register_fake("vcl_kernels::loss", lib=_library)
def _(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce):  # type: ignore[no-untyped-def]
    return _loss_and_dbeta(x, beta, per_activation, reduce, False)[0]


@torch.library.register_fake("vcl_kernels::loss_dx", lib=_library)
def _(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad):  # type: ignore[no-untyped-def]
    loss, dbeta = _loss_and_dbeta(x, beta, per_activation, reduce, beta_grad)
    return loss, torch.empty_like(x), dbeta


@torch.library.register_fake("vcl_kernels::loss_coefficients", lib=_library)
def _(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad):  # type: ignore[no-untyped-def]
    loss, dbeta = _loss_and_dbeta(x, beta, per_activation, reduce, beta_grad)
    return loss, _units(x, per_activation, K), _units(x, per_activation, K), dbeta


@torch.library.register_fake("vcl_kernels::moments", lib=_library)
def _(x, n, K, per_activation):  # type: ignore[no-untyped-def]
    return _units(x, per_activation, K), _units(x, per_activation, K)


@torch.library.register_fake("vcl_kernels::moments_dx", lib=_library)
def _(x, mean, scale, shift, n, rows, per_activation):  # type: ignore[no-untyped-def]
    return geometry.empty_rows(x, rows)


@torch.library.register_fake("vcl_kernels::multiply_", lib=_library)
def _(dx, g):  # type: ignore[no-untyped-def]
    return None

"""The registered ops: their schemas, what they return for fake tensors, and the backend that each device gets.

Every function here but ``multiply_`` takes tensors however they lie, and the values of a ``LossSpec``. ``mean``,
``var``, ``scale`` and ``shift`` are ``(K, *units)`` in the accumulation dtype. Results lie as x does, those of units in
x's order of units; or as for a contiguous x where kernels cannot read x where it lies.
"""

from __future__ import annotations

import torch

from .backends import load_native, one_pass, register_triton
from .geometry import accumulation_dtype, empty_rows, empty_units, in_layout

__all__ = [
    "activation",
    "activation_dx",
    "loss",
    "loss_coefficients",
    "loss_dx",
    "moments",
    "moments_dx",
    "multiply_",
    "one_pass",
]

SPEC = "float beta_value, float beta_min, SymInt n, SymInt K, int form, bool per_activation, float factor, bool reduce"
ACTIVATION = "int activation, float parameter"

library = torch.library.Library("vcl_kernels", "DEF")


def define(schema: str) -> None:
    """Define an op that takes its arguments in whatever layout a compiler chose for them, not only that of tracing."""
    library.define(schema, tags=(torch.Tag.flexible_layout,))


define(f"loss(Tensor x, Tensor? beta, {SPEC}) -> Tensor")
define(f"loss_dx(Tensor x, Tensor? beta, {SPEC}, bool beta_grad) -> (Tensor loss, Tensor dx, Tensor dbeta)")
define(
    f"loss_coefficients(Tensor x, Tensor? beta, {SPEC}, bool beta_grad, bool keep_rows) "
    "-> (Tensor loss, Tensor mean, Tensor scale, Tensor dbeta, Tensor rows)"
)
define("moments(Tensor x, SymInt n, SymInt K, bool per_activation) -> (Tensor mean, Tensor var)")
define(
    "moments_dx(Tensor x, Tensor mean, Tensor scale, Tensor? shift, Tensor? g, SymInt n, SymInt N, "
    "bool per_activation) -> Tensor"
)
define(
    f"activation(Tensor x, Tensor? beta, {SPEC}, bool beta_grad, {ACTIVATION}, bool keep_rows) "
    "-> (Tensor y, Tensor loss, Tensor mean, Tensor scale, Tensor dbeta, Tensor rows)"
)
define(
    "activation_dx(Tensor? saved, bool from_output, Tensor? rows, Tensor? dy, Tensor mean, Tensor scale, Tensor? g, "
    f"SymInt n, SymInt N, bool per_activation, {ACTIVATION}) -> Tensor"
)
library.define("multiply_(Tensor(a!) dx, Tensor g) -> ()")  # dx is dense

load_native()
register_triton(library)

# What autograd calls. A triton backend under the interpreter has functions of the same names.
loss = torch.ops.vcl_kernels.loss.default
loss_dx = torch.ops.vcl_kernels.loss_dx.default
loss_coefficients = torch.ops.vcl_kernels.loss_coefficients.default
moments = torch.ops.vcl_kernels.moments.default
moments_dx = torch.ops.vcl_kernels.moments_dx.default
activation = torch.ops.vcl_kernels.activation.default
activation_dx = torch.ops.vcl_kernels.activation_dx.default
multiply_ = torch.ops.vcl_kernels.multiply_.default


def _loss_and_dbeta(x, beta, per_activation, reduce, beta_grad):  # type: ignore[no-untyped-def]
    loss = x.new_empty((), dtype=accumulation_dtype(x.dtype)) if reduce else empty_units(x, per_activation)
    if not beta_grad:
        return loss, x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    return loss, torch.empty_like(loss) if reduce and beta.dim() == 0 else empty_units(x, per_activation)


@torch.library.register_fake("vcl_kernels::loss", lib=library)
def _(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce):  # type: ignore[no-untyped-def]
    x = in_layout(x, per_activation)
    return _loss_and_dbeta(x, beta, per_activation, reduce, False)[0]


@torch.library.register_fake("vcl_kernels::loss_dx", lib=library)
def _(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad):  # type: ignore[no-untyped-def]
    x = in_layout(x, per_activation)
    loss, dbeta = _loss_and_dbeta(x, beta, per_activation, reduce, beta_grad)
    return loss, empty_rows(x, x.shape[0]), dbeta


@torch.library.register_fake("vcl_kernels::loss_coefficients", lib=library)
def _(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad, keep):  # type: ignore[no-untyped-def]
    x = in_layout(x, per_activation)
    loss, dbeta = _loss_and_dbeta(x, beta, per_activation, reduce, beta_grad)
    mean, scale = empty_units(x, per_activation, K), empty_units(x, per_activation, K)
    return loss, mean, scale, dbeta, empty_rows(x, K * n) if keep else x.new_empty(0)


@torch.library.register_fake("vcl_kernels::moments", lib=library)
def _(x, n, K, per_activation):  # type: ignore[no-untyped-def]
    x = in_layout(x, per_activation)
    return empty_units(x, per_activation, K), empty_units(x, per_activation, K)


@torch.library.register_fake("vcl_kernels::moments_dx", lib=library)
def _(x, mean, scale, shift, g, n, N, per_activation):  # type: ignore[no-untyped-def]
    return empty_rows(in_layout(x, per_activation), N)


@torch.library.register_fake("vcl_kernels::activation", lib=library)
def _(x, beta, beta_value, beta_min, n, K, form, per_activation, factor, reduce, beta_grad, kind, parameter, keep):  # type: ignore[no-untyped-def]
    x = in_layout(x, per_activation)
    loss, dbeta = _loss_and_dbeta(x, beta, per_activation, reduce, beta_grad)
    mean, scale = empty_units(x, per_activation, K), empty_units(x, per_activation, K)
    return empty_rows(x, x.shape[0]), loss, mean, scale, dbeta, empty_rows(x, K * n) if keep else x.new_empty(0)


@torch.library.register_fake("vcl_kernels::activation_dx", lib=library)
def _(saved, from_output, rows, dy, mean, scale, g, n, N, per_activation, kind, parameter):  # type: ignore[no-untyped-def]
    return empty_rows(in_layout(rows if saved is None else saved, per_activation), N)


@torch.library.register_fake("vcl_kernels::multiply_", lib=library)
def _(dx, g):  # type: ignore[no-untyped-def]
    return None

"""The registered ops: their schemas, what they return for fake tensors, and the functions of a ``Backend`` on them.

Schemas list plain arguments in the order of ``LossSpec``, ``SubBatches`` and ``Activation``. ``mean``, ``var``,
``scale`` and ``shift`` are ``(K, *units)`` in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import cpu, one_pass, triton, triton_backend
from .backends.interface import Backend, Coefficients, Saved
from .geometry import accumulation_dtype, empty_rows, empty_units, in_layout
from .options import Activation, LossSpec, SubBatches

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

_ops = torch.ops.vcl_kernels
_LOSS = len(LossSpec._fields)


# A Backend on the ops: values become plain arguments.


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec) -> Tensor:
    """See :class:`Backend`, as of all functions here."""
    return _ops.loss.default(x, beta, *spec)


def loss_dx(x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`Backend`."""
    return _ops.loss_dx.default(x, beta, *spec, beta_grad)


def loss_coefficients(
    x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool, keep_rows: bool
) -> tuple[Tensor, Coefficients, Tensor, Tensor]:
    """See :class:`Backend`."""
    loss, mean, scale, dbeta, rows = _ops.loss_coefficients.default(x, beta, *spec, beta_grad, keep_rows)
    return loss, Coefficients(mean, scale), dbeta, rows


def activation(
    x: Tensor, beta: Tensor | None, spec: LossSpec, activation: Activation, beta_grad: bool, keep_rows: bool
) -> tuple[Tensor, Tensor, Coefficients, Tensor, Tensor]:
    """See :class:`Backend`."""
    y, loss, mean, scale, dbeta, rows = _ops.activation.default(x, beta, *spec, beta_grad, *activation, keep_rows)
    return y, loss, Coefficients(mean, scale), dbeta, rows


def activation_dx(
    saved: Saved,
    dy: Tensor | None,
    coefficients: Coefficients,
    g: Tensor | None,
    activation: Activation,
    sub_batches: SubBatches,
    N: int,
) -> Tensor:
    """See :class:`Backend`."""
    (n, _, per_activation), (mean, scale, _) = sub_batches, coefficients
    return _ops.activation_dx.default(
        saved.tensor, saved.from_output, saved.rows, dy, mean, scale, g, n, N, per_activation, *activation
    )


def moments(x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
    """See :class:`Backend`."""
    return _ops.moments.default(x, *sub_batches)


def moments_dx(x: Tensor, coefficients: Coefficients, g: Tensor | None, sub_batches: SubBatches, N: int) -> Tensor:
    """See :class:`Backend`."""
    return _ops.moments_dx.default(x, *coefficients, g, sub_batches.n, N, sub_batches.per_activation)


def multiply_(dx: Tensor, g: Tensor) -> None:
    """See :class:`Backend`."""
    _ops.multiply_.default(dx, g)


# The other way round: a Backend serves a device's tensors, and plain arguments become values again.


def _register(backend: Callable[[], Backend], device: str) -> None:
    """Register a backend that is fetched in the first call."""

    def loss(x: Tensor, beta: Tensor | None, *spec: Any) -> Any:
        return backend().loss(x, beta, LossSpec(*spec))

    def loss_dx(x: Tensor, beta: Tensor | None, *plain: Any) -> Any:
        return backend().loss_dx(x, beta, LossSpec(*plain[:_LOSS]), *plain[_LOSS:])

    def loss_coefficients(x: Tensor, beta: Tensor | None, *plain: Any) -> Any:
        loss, (mean, scale, _), dbeta, rows = backend().loss_coefficients(
            x, beta, LossSpec(*plain[:_LOSS]), *plain[_LOSS:]
        )
        return loss, mean, scale, dbeta, rows

    def activation(x: Tensor, beta: Tensor | None, *plain: Any) -> Any:
        beta_grad, kind, parameter, keep_rows = plain[_LOSS:]
        y, loss, (mean, scale, _), dbeta, rows = backend().activation(
            x, beta, LossSpec(*plain[:_LOSS]), Activation(kind, parameter), beta_grad, keep_rows
        )
        return y, loss, mean, scale, dbeta, rows

    def activation_dx(saved: Tensor | None, from_output: bool, rows: Tensor | None, *plain: Any) -> Any:
        dy, mean, scale, g, n, N, per_activation, kind, parameter = plain
        of_x, cut = Saved(saved, rows, from_output), SubBatches(n, mean.shape[0], per_activation)
        return backend().activation_dx(of_x, dy, Coefficients(mean, scale), g, Activation(kind, parameter), cut, N)

    def moments(x: Tensor, *sub_batches: Any) -> Any:
        return backend().moments(x, SubBatches(*sub_batches))

    def moments_dx(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None, *plain: Any) -> Any:
        g, n, N, per_activation = plain
        cut = SubBatches(n, mean.shape[0], per_activation)
        return backend().moments_dx(x, Coefficients(mean, scale, shift), g, cut, N)

    def multiply_(dx: Tensor, g: Tensor) -> None:
        backend().multiply_(dx, g)

    for function in (loss, loss_dx, loss_coefficients, activation, activation_dx, moments, moments_dx, multiply_):
        library.impl(function.__name__, function, device)


cpu.load()  # its library registers itself
if triton.reason_not_installed() is None and not triton.interpreting():
    _register(triton_backend, "CUDA")


# What the ops return for fake tensors: shapes, dtypes and strides.


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"vcl_kernels::{name}", lib=library)


def _fake_loss_and_dbeta(x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor]:
    sum_dtype, per_activation = accumulation_dtype(x.dtype), spec.per_activation
    loss = x.new_empty((), dtype=sum_dtype) if spec.reduce else empty_units(x, per_activation)
    if beta is None or not beta_grad:
        return loss, x.new_empty(0, dtype=sum_dtype)
    return loss, torch.empty_like(loss) if spec.reduce and beta.dim() == 0 else empty_units(x, per_activation)


@_fake("loss")
def _(x: Tensor, beta: Tensor | None, *spec: Any) -> Tensor:
    of = LossSpec(*spec)
    return _fake_loss_and_dbeta(in_layout(x, of.per_activation), beta, of, False)[0]


@_fake("loss_dx")
def _(x: Tensor, beta: Tensor | None, *plain: Any) -> tuple[Tensor, ...]:
    spec = LossSpec(*plain[:_LOSS])
    x = in_layout(x, spec.per_activation)
    loss, dbeta = _fake_loss_and_dbeta(x, beta, spec, plain[_LOSS])
    return loss, empty_rows(x, x.shape[0]), dbeta


@_fake("loss_coefficients")
def _fake_coefficients(x: Tensor, beta: Tensor | None, *plain: Any) -> tuple[Tensor, ...]:
    spec, (beta_grad, *_, keep_rows) = LossSpec(*plain[:_LOSS]), plain[_LOSS:]
    x = in_layout(x, spec.per_activation)
    loss, dbeta = _fake_loss_and_dbeta(x, beta, spec, beta_grad)
    mean, scale = (empty_units(x, spec.per_activation, spec.K) for _ in range(2))
    return loss, mean, scale, dbeta, empty_rows(x, spec.K * spec.n) if keep_rows else x.new_empty(0)


@_fake("activation")
def _(x: Tensor, beta: Tensor | None, *plain: Any) -> tuple[Tensor, ...]:
    y = empty_rows(in_layout(x, LossSpec(*plain[:_LOSS]).per_activation), x.shape[0])
    return y, *_fake_coefficients(x, beta, *plain)


@_fake("moments")
def _(x: Tensor, *sub_batches: Any) -> tuple[Tensor, ...]:
    _, K, per_activation = sub_batches
    x = in_layout(x, per_activation)
    return empty_units(x, per_activation, K), empty_units(x, per_activation, K)


@_fake("moments_dx")
def _(x: Tensor, *plain: Any) -> Tensor:
    *_, N, per_activation = plain
    return empty_rows(in_layout(x, per_activation), N)


@_fake("activation_dx")
def _(saved: Tensor | None, _from_output: bool, rows: Tensor, *plain: Any) -> Tensor:
    N, per_activation = plain[5:7]
    return empty_rows(in_layout(rows if saved is None else saved, per_activation), N)


@_fake("multiply_")
def _(*_: Tensor) -> None:
    return None

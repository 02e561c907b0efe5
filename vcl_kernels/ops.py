"""The registered ops, and a ``Backend`` on them.

An op takes and returns what the function of a ``Backend`` does, with the fields of each value as plain arguments.
``mean``, ``var``, ``scale`` and ``shift`` are ``(K, *units)`` in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import cpu, fake, triton_backend
from .backends import takes_one_pass as takes_one_pass  # of the Backend
from .backends.interface import Coefficients, Saved
from .backends.triton import available
from .options import Activation, LossSpec, SubBatches

library = torch.library.Library("vcl_kernels", "DEF")

FIELDS: dict[type, str] = {
    LossSpec: "float beta_value, float beta_min, SymInt n, SymInt K, int form, bool per_activation, float factor, "
    "bool reduce",
    SubBatches: "SymInt n, SymInt K, bool per_activation",
    Activation: "int activation, float parameter",
    Coefficients: "Tensor mean, Tensor scale, Tensor? shift",
    Saved: "Tensor saved, Tensor? rows, bool from_output",
}


class Op(NamedTuple):
    """The schema of an op, with values by their types."""

    name: str
    arguments: tuple[Any, ...]  # strings, or the types of values
    results: str

    def define(self) -> None:
        """Define it. It takes arguments in whatever layout a compiler chose for them, unless it writes to them."""
        schema = ", ".join(a if isinstance(a, str) else FIELDS[a] for a in self.arguments)
        tags = () if "!" in schema else (torch.Tag.flexible_layout,)
        library.define(f"{self.name}({schema}) -> {self.results}", tags=tags)

    def implement(self, function: Callable[..., Any], key: str) -> None:
        """Let ``function`` of values serve a dispatch key, or "Fake" tensors."""
        if key == "Fake":
            torch.library.register_fake(f"vcl_kernels::{self.name}", self.of_plain(function), lib=library)
        else:
            library.impl(self.name, self.of_plain(function), key)

    def of_plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the op's plain arguments that calls ``function`` with values."""

        def implementation(*plain: Any) -> Any:
            rest = iter(plain)
            values = (next(rest) if isinstance(a, str) else a(*islice(rest, len(a._fields))) for a in self.arguments)
            result = function(*values)
            return tuple(_flat(result)) if isinstance(result, tuple) else result

        return implementation


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from (field for field in value if field is not None)
        else:
            yield value


LOSS = ("Tensor x", "Tensor? beta", LossSpec)
OPS = (
    Op("loss", LOSS, "Tensor"),
    Op("loss_dx", (*LOSS, "bool beta_grad"), "(Tensor loss, Tensor dx, Tensor dbeta)"),
    Op(
        "loss_coefficients",
        (*LOSS, "bool beta_grad", "bool keep_rows"),
        "(Tensor loss, Tensor mean, Tensor scale, Tensor dbeta, Tensor rows)",
    ),
    Op(
        "activation",
        (*LOSS, Activation, "bool beta_grad", "bool keep_rows"),
        "(Tensor y, Tensor loss, Tensor mean, Tensor scale, Tensor dbeta, Tensor rows)",
    ),
    Op(
        "activation_dx",
        (Saved, "Tensor? dy", Coefficients, "Tensor? g", Activation, SubBatches, "SymInt N"),
        "Tensor",
    ),
    Op("moments", ("Tensor x", SubBatches), "(Tensor mean, Tensor var)"),
    Op("moments_dx", ("Tensor x", Coefficients, "Tensor? g", SubBatches, "SymInt N"), "Tensor"),
    Op("multiply_", ("Tensor(a!) dx", "Tensor g"), "()"),  # dx is dense
)

for _op in OPS:
    _op.define()


# A Backend on the ops

_ops = torch.ops.vcl_kernels


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec) -> Tensor:
    return _ops.loss.default(x, beta, *spec)


def loss_dx(x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.loss_dx.default(x, beta, *spec, beta_grad)


def loss_coefficients(
    x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool, keep_rows: bool
) -> tuple[Tensor, Coefficients, Tensor, Tensor]:
    loss, mean, scale, dbeta, rows = _ops.loss_coefficients.default(x, beta, *spec, beta_grad, keep_rows)
    return loss, Coefficients(mean, scale), dbeta, rows


def activation(
    x: Tensor, beta: Tensor | None, spec: LossSpec, activation: Activation, beta_grad: bool, keep_rows: bool
) -> tuple[Tensor, Tensor, Coefficients, Tensor, Tensor]:
    y, loss, mean, scale, dbeta, rows = _ops.activation.default(x, beta, *spec, *activation, beta_grad, keep_rows)
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
    return _ops.activation_dx.default(*saved, dy, *coefficients, g, *activation, *sub_batches, N)


def moments(x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
    return _ops.moments.default(x, *sub_batches)


def moments_dx(x: Tensor, coefficients: Coefficients, g: Tensor | None, sub_batches: SubBatches, N: int) -> Tensor:
    return _ops.moments_dx.default(x, *coefficients, g, *sub_batches, N)


def multiply_(dx: Tensor, g: Tensor) -> None:
    _ops.multiply_.default(dx, g)


# Implementations: C++ for CPU, registered when loaded; Triton for CUDA, imported by the first call; fake tensors


def _of_triton(name: str) -> Callable[..., Any]:
    return lambda *values: getattr(triton_backend(), name)(*values)


cpu.load()
for _op in OPS:
    _op.implement(getattr(fake, _op.name), "Fake")
    if available.reason_not_installed() is None and not available.interpreting():
        _op.implement(_of_triton(_op.name), "CUDA")

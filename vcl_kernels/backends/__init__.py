"""The backends: which can run here, and which serves a tensor. They know nothing of each other."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from ..options import LossSpec
from . import cpu
from .interface import Backend
from .triton import available

NAMES = ("cpu", "triton", "reference")


@cache
def triton_backend() -> Backend:
    """Import Triton and return its ops, which serve CUDA tensors, and CPU tensors under the interpreter."""
    from .triton import ops

    return ops


def backends() -> dict[str, str]:
    """Return each backend's name with ``"available"``, or with why it cannot run here and what to install.

    >>> backends()["reference"]
    'available'
    """
    reasons = {"cpu": cpu.reason(), "triton": available.reason(), "reference": None}
    return {name: reason or "available" for name, reason in reasons.items()}


def choose(name: str | None, x: Tensor) -> str:
    """Return the backend that serves ``x``: the named one, or the fastest that runs.

    Raises:
        ValueError: the name is unknown, or the backend does not take tensors of x's device.
        RuntimeError: the named backend cannot run here.
    """
    device = x.device.type
    if name is None:
        if device in ("cpu", "meta"):  # of meta tensors the ops' shapes and strides
            return "cpu" if cpu.reason() is None else "reference"
        compiles = available.reason_not_installed() is None and not available.interpreting()
        return "triton" if device == "cuda" and compiles else "reference"
    if name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}; got {name!r}")
    if name == "reference":
        return name
    reason = cpu.reason() if name == "cpu" else available.reason()
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    serves = "cpu" if name == "cpu" or available.interpreting() else "cuda"
    if device != serves:
        raise ValueError(f"backend={name!r} takes {serves} tensors here; x is on {x.device}")
    return name


def takes_one_pass(x: Tensor, spec: LossSpec) -> bool:
    """Whether the backend of x's device computes loss and gradient from one read of memory."""
    if x.device.type in ("cpu", "meta"):
        return cpu.takes_one_pass(x, spec)
    return triton_backend().takes_one_pass(x, spec)

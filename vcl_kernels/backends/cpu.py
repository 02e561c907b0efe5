"""The native CPU backend: csrc/cpu, compiled into ``_C`` and registered with the dispatcher when loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..geometry import Geometry
from ..options import LossSpec

# One pass reads x again for the gradient, from a cache. Most bytes of x for that:
_ONE_PASS_UNIT = 4 << 20  # one unit
_ONE_PASS_BLOCK = 64 << 10  # 64 neighbouring units: their samples lie far apart and share few cache sets

_reason: str | None = "the native extension was not looked for yet"  # found once: it is asked for in every call


def load() -> None:
    """Load the extension, if it was built and fits this machine; else find out why it cannot run."""
    global _reason
    path = _library_path()
    try:
        if path is not None:
            torch.ops.load_library(str(path))
        _reason = _not_built() if path is None else None
    except (OSError, RuntimeError) as error:  # built against another torch or C library, or cut off
        _reason = f"{path} cannot be loaded ({error}); {_BUILD}"


def _library_path() -> Path | None:
    return next(iter(sorted(Path(__file__).parent.parent.glob("_C*.so"))), None)


_BUILD = "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder builds it"


def _not_built() -> str:
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    lacking = f"; missing here: {', '.join(missing)}" if missing else ""
    return (
        "the native extension was not built; install a C++20 compiler (g++ >= 11 or clang >= 14) and ninja, then "
        f"{_BUILD}{lacking}"
    )


def reason() -> str | None:
    """Return why the backend cannot run, or None if it can."""
    return _reason


def takes_one_pass(x: Tensor, spec: LossSpec) -> bool:
    """Whether loss and gradient come from one read of memory."""
    size = x.element_size()
    if x.numel() * size <= _ONE_PASS_BLOCK:  # decided without a Geometry: a small loss is all fixed cost
        return True
    g = Geometry.of(x, spec)
    if g.spatial:
        return g.K * g.M * size <= _ONE_PASS_UNIT
    coefficients = 2 * max(size, 4)  # bytes of mean and scale, which are saved if backward makes the gradient
    return min(64, g.U) * g.K * g.M * size <= _ONE_PASS_BLOCK or g.M * size <= coefficients

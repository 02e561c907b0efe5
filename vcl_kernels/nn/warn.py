"""The warning that VCL has no effect, or one that is probably not wanted."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import torch

from ..torch_private import while_tracing

__all__ = ["VCLWarning", "warn"]


LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, Path(__file__).parent))


class VCLWarning(UserWarning):
    """VCL has no effect in some place, or one that is probably not wanted. The text says why, and what to do."""


def _warn(text: str) -> bool:
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, VCLWarning, stacklevel=level)
    return True


_while_tracing = while_tracing(_warn)


def warn(said: set[str], kind: str, text: str) -> None:
    """Issue one :class:`VCLWarning` of each ``kind``; ``said`` keeps which were issued."""
    if kind not in said:
        said.add(kind)
        _while_tracing(text)

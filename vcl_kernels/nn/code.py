"""Whether the code of forwards that cannot be followed has to do with batch norms as such."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .norms import BUFFERS, own_names

__all__ = ["norm_in_code"]

OF_NORMS_ONLY = {*BUFFERS, "track_running_stats", "reset_running_stats"}  # whatever the object is called


def norm_in_code(model: nn.Module, norms: Iterable[tuple[nn.Module, str]]) -> str | None:
    """Return a phrase on code that reads attributes of ``norms``, or names their class; None: there is none.

    It looks at forwards of classes that are not torch's, and the methods that they call. ``self.bn.weight`` is found,
    ``self.bn.running_mean``, and ``isinstance(m, nn.BatchNorm2d)``.
    """
    last_names = {name.rpartition(".")[2] for _, name in norms}
    own = {attribute for norm, _ in norms for attribute in own_names(norm)}
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if kind.__module__.partition(".")[0] == "torch" and not kind.__module__.startswith("torch.ao"):
            continue
        for name, code in _methods(kind, "forward"):
            found = _in_code(code, last_names, own)
            if found:
                return f"{kind.__name__}.{name} names {found!r}"
    return None


def _methods(kind: type, first: str) -> Iterator[tuple[str, CodeType]]:
    """Yield the code of a method, and of those that it names, and so on."""
    names = [first]
    for name in names:
        method = getattr(kind, name, None)
        if isinstance(method, FunctionType) and method.__module__ != nn.Module.__module__:
            yield name, method.__code__
            names += [other for other in method.__code__.co_names if other not in names]


def _in_code(code: CodeType, last_names: set[str], own: set[str]) -> str | None:
    """Return what the code names of a batch norm."""
    owner = ""
    for step in dis.get_instructions(code):
        name: Any = step.argval[-1] if isinstance(step.argval, tuple) else step.argval  # of two loaded at once
        if isinstance(name, CodeType):
            found = _in_code(name, last_names, own)
            if found:
                return found
        if step.opname.startswith("LOAD") and isinstance(name, str):
            of_norm = owner in last_names and name in own
            if "BatchNorm" in name or of_norm or (name in OF_NORMS_ONLY and owner != "self"):
                return f"{owner}.{name}" if owner and step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) else name
            owner = name
        elif step.opname not in ("CACHE", "EXTENDED_ARG"):
            owner = ""
    return None

"""What the code of forwards has to do with batch norms and types: where they cannot be traced, or a trace misleads."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .norms import BUFFERS, own_names

__all__ = ["asks_for_tensors", "norm_in_code"]

ITEM = "[]"  # of something, which may be a norm
OF_NORMS_ONLY = {*BUFFERS, "track_running_stats", "reset_running_stats"}  # whatever the object is called


def norm_in_code(model: nn.Module, norms: Iterable[tuple[nn.Module, str]]) -> str | None:
    """Return a phrase on code that reads attributes of ``norms``, or names their class; None: there is none.

    It looks at forwards of classes that are not torch's, the methods that they call, functions in attributes and hooks:
    ``self.bn.weight``, ``norm = self.bn; norm.weight``, ``self.norms[0].weight``, ``anything.running_mean``,
    ``isinstance(m, nn.BatchNorm2d)``.
    """
    own = {attribute for norm, _ in norms for attribute in own_names(norm)}
    inside = {norm for norm, _ in norms}

    def find(module: nn.Module, code: CodeType) -> str | None:
        names = {name.rpartition(".")[2] for name, child in module.named_modules() if child in inside}
        return _norm_in(code, names, own)

    return _found_in_code(model.modules(), find)


def asks_for_tensors(modules: Iterable[nn.Module]) -> str | None:
    """Return a phrase on code of ``modules`` that names the type of tensors; None: there is none."""
    names = {"Tensor", "is_tensor"}
    return _found_in_code(modules, lambda _, code: next((name for name in _names_in(code) if name in names), None))


def _found_in_code(modules: Iterable[nn.Module], find: Callable[[nn.Module, CodeType], str | None]) -> str | None:
    methods: dict[type, list[tuple[str, CodeType]]] = {}
    for module in modules:
        kind = type(module)
        if kind not in methods:
            methods[kind] = list(_methods(kind, "forward"))
        for name, code in [*methods[kind], *_functions_of(module)]:
            found = find(module, code)
            if found:
                return f"{kind.__name__}.{name} names {found!r}"
    return None


def _functions_of(module: nn.Module) -> Iterator[tuple[str, CodeType]]:
    """Yield the code of functions that the module has in its attributes, and of its hooks."""
    for name, value in vars(module).items():
        for function in value.values() if isinstance(value, dict) else [value]:
            function = getattr(function, "func", function)  # of a partial
            function = getattr(function, "__func__", function)  # of a method
            if isinstance(function, FunctionType) and _is_users(function):
                yield name, inspect.unwrap(function).__code__


def _methods(kind: type, first: str) -> Iterator[tuple[str, CodeType]]:
    """Yield the code of a method and its overridden ones, of the methods that these name, and so on."""
    names = [first]
    for name in names:
        for base in kind.__mro__:
            method = vars(base).get(name)
            method = getattr(method, "fget", None) or getattr(method, "__func__", method)  # of a property, a static one
            function = inspect.unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType) and _is_users(function):
                yield name, function.__code__
                names += [other for other in _names_in(function.__code__) if other not in names]


def _is_users(function: FunctionType) -> bool:
    """Whether a function is the user's: torch's layers for quantisation read batch norms too."""
    module = function.__module__ or ""
    return not module.startswith("torch.") or module.startswith("torch.ao.")


def _names_in(code: CodeType) -> list[str]:
    """Return the names of attributes and globals in code, that of inner functions too."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names_in(constant)]
    return [*code.co_names, *inner]


def _norm_in(code: CodeType, last_names: set[str], own: set[str]) -> str | None:
    """Return what the code names of a batch norm."""
    owner = ""
    for step in dis.get_instructions(code):
        name: Any = step.argval
        if isinstance(name, tuple) and name:  # two are loaded at once
            name = name[-1]
        if isinstance(name, CodeType):
            found = _norm_in(name, last_names, own)
            if found:
                return found
        if step.opname.startswith("LOAD") and isinstance(name, str):
            reads = step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))
            of_norm = (owner in last_names or owner == ITEM) and name in own
            if "BatchNorm" in name or (reads and (of_norm or (name in OF_NORMS_ONLY and owner != "self"))):
                return f"{owner}.{name}" if owner and reads else name
            owner = name
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "COPY", "DUP_TOP"):
            if step.opname.startswith("STORE_FAST") and owner in last_names:
                last_names.add(name)  # the norm has this name too
            owner = ITEM if step.opname == "BINARY_SUBSCR" or step.argrepr == "[]" else ""
    return None

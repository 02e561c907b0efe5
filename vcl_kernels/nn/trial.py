"""Copies of modules to try out, so that nothing of the modules themselves changes."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import tensors_in

__all__ = ["MODULE_ATTRIBUTES", "model_copy", "trial_copy"]

MODULE_ATTRIBUTES = set(vars(nn.Module()))  # that every module has


def trial_copy(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of ``module`` in evaluation, with tensors and containers of its own, and no hooks.

    It is shallow otherwise: an attribute may hold a whole teacher network, or what cannot be copied.

    Args:
        module: a module without children.
        dtype: its floating-point tensors become that, on the CPU; those on meta get drawn values. None: they stay.
    """
    copied = object.__new__(type(module))
    copied.__dict__.update(nn.Module().__dict__)
    for name, value in vars(module).items():
        if name not in copied.__dict__:
            copied.__dict__[name] = _own(value, module, copied)
    for name in ("_parameters", "_buffers"):
        copied.__dict__[name] = {key: _tensor(value, dtype) for key, value in vars(module)[name].items()}
    copied.training = False
    return copied


def _own(value: Any, module: nn.Module, copied: nn.Module) -> Any:
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, copied)
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else value


def _tensor(value: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if value is None:
        return None
    if dtype is None or not value.is_floating_point():
        return value.detach().clone()
    if value.is_meta:
        return torch.rand(value.shape, dtype=dtype, device="cpu") * 0.8 + 0.1
    return value.detach().to("cpu", dtype, copy=True)


def model_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model``, which shares nothing with it.

    A tensor that a forward left in an attribute loses its graph in the copy: with it, it could not be copied.

    Raises:
        ValueError: it cannot be copied, or copies as itself.
    """
    left = [t for module in model.modules() for t in tensors_in(_attributes(module)) if not t.is_leaf]
    try:
        copied = copy.deepcopy(model, {id(t): t.detach().clone() for t in left})
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error})") from error
    if any(twin is module for twin, module in zip(copied.modules(), model.modules(), strict=True)):
        raise ValueError(f"{type(model).__name__} cannot be copied: a part of it copies as itself")
    return copied


def _attributes(value: Any) -> list[Any]:
    """Return the attributes of a module that are its user's, with those of plain objects among them."""
    found = [item for name, item in vars(value).items() if name not in MODULE_ATTRIBUTES]
    return found + [list(vars(item).values()) for item in found if hasattr(item, "__dict__") and not callable(item)]

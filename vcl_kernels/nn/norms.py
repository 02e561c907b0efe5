"""The batch norms of a model, and which of them can be removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..torch_private import batch_norm_types, hooks_of
from .affine import ChannelAffine

__all__ = ["BATCH_NORMS", "BUFFERS", "batch_norms", "norms_that_stay", "own_names"]

BATCH_NORMS = batch_norm_types()
PARAMETERS = {"weight", "bias"}
BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
OF_ANY_MODULE = {*dir(nn.Module()), "forward"}


def batch_norms(model: nn.Module) -> dict[Any, str]:
    """Return the batch norms of the model and their names. Raise ValueError where one cannot be removed."""
    norms: dict[Any, str] = {module: name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    _check_registered(model)
    if not norms:
        raise ValueError(f"model ({type(model).__name__}) has no batch norm to remove")
    for module in model.modules():
        if type(module).__eq__ is not object.__eq__:
            raise ValueError(
                f"model has a {type(module).__name__}, whose class has an __eq__, so that modules cannot be told apart"
            )
    if any(not is_lazy(t) and t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"model ({type(model).__name__}) was made in torch.inference_mode(), and cannot be changed")
    for norm, name in norms.items():
        reason = _why_not(norm)
        if reason:
            raise ValueError(f"model has a {type(norm).__name__}, {name!r}, {reason}")
    return norms


def own_names(norm: nn.Module) -> set[str]:
    """Return the attributes that ``norm`` has as a batch norm, which what takes its place has not, or otherwise."""
    children = {name for name, _ in norm.named_children()}
    return {name for name in dir(norm) if not name.startswith("__")} - OF_ANY_MODULE - children


def _why_not(norm: Any) -> str | None:
    """Return why ``norm`` cannot be removed."""
    if norm.running_mean is not None and is_lazy(norm.running_mean):
        return "that has not seen any input; run a forward first"
    lost = _what_would_be_lost(norm)
    if lost:
        return f"with {lost}, which would be lost; take that off before, or replace it by hand"
    if norm.running_mean is None or norm.running_var is None:
        return (
            "without running statistics (track_running_stats=False), so that what it computes depends on the batch; "
            "set its running_mean and running_var (zeros and ones keep weight and bias as they are)"
        )
    return None


def _what_would_be_lost(norm: Any) -> str | None:
    """Return what ``norm`` has beside what makes it a batch norm."""
    if any(isinstance(value, dict) and value for value in hooks_of(norm).values()):  # those of its state too
        return "hooks"
    kind = type(norm)
    if is_parametrized(norm):
        return "parametrizations"
    for name in ("__call__", "_call_impl", "__getattr__"):
        if getattr(kind, name) is not getattr(nn.Module, name):
            return f"a {name} of its own"
    if not _can_become_another(kind):
        return "__slots__"
    if kind.train is not nn.Module.train and copy.deepcopy(norm).eval().training:
        return "a train() that keeps it in training mode"
    others = {name for name, _ in norm.named_parameters(recurse=False)} - PARAMETERS
    others |= {name for name, _ in norm.named_buffers(recurse=False)} - BUFFERS
    if others:
        return f"parameters or buffers of its own ({', '.join(sorted(others))})"
    plain = kind.forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    children = any(True for _ in norm.children())
    if "forward" in vars(norm) or not (plain or children):
        return "a forward of its own"
    if children and not _computes_its_children_after(norm):
        return "children that are not simply run after it"
    return None


def _can_become_another(kind: type[nn.Module]) -> bool:
    """Whether an object of ``kind`` can change its class: not with ``__slots__``."""
    try:
        object.__new__(kind).__class__ = ChannelAffine
    except (TypeError, AttributeError):
        return False
    return True


def _computes_its_children_after(norm: Any) -> bool:
    """Whether ``norm`` is a batch norm followed by its children in their order, as the layers of timm are.

    It is tried in float64 on a copy and drawn values, in both modes: with the batch's statistics as running ones, these
    agree.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)

    spatial = 3 if isinstance(norm, nn.BatchNorm3d) else 1 if isinstance(norm, nn.BatchNorm1d) else 2
    try:
        trial = copy.deepcopy(norm).cpu().double()
        x = draw(6, norm.num_features, *(4,) * spatial)
        var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
        with torch.no_grad():
            trial.running_mean.copy_(mean)
            trial.running_var.copy_(var)
            for parameter in (trial.weight, trial.bias):
                if parameter is not None:
                    parameter.copy_(draw(norm.num_features))
            wanted = F.batch_norm(x, mean, var, trial.weight, trial.bias, eps=norm.eps)
            trial.eval().momentum = 0
            for child in trial.children():
                wanted = child(wanted)
            for training in (False, True):
                trial.training = training
                if not torch.allclose(trial(x.clone()), wanted, rtol=1e-9, atol=1e-9):
                    return False
    except Exception:  # it runs code of the user's
        return False
    return True


def _check_registered(model: nn.Module) -> None:
    """Raise ValueError for a batch norm that a module holds in a list, tuple, set or dict alone, or in TorchScript."""
    for name, module in model.named_modules():
        if "BatchNorm" in str(getattr(module, "original_name", "")):
            raise ValueError(f"model has a scripted batch norm, {name!r}; remove it before torch.jit.script or trace")
    for place, module in _unregistered(model):
        if isinstance(module, BATCH_NORMS):
            raise ValueError(
                f"model has a {type(module).__name__} in {place}, and not among its modules; hold it in an "
                "nn.ModuleList or nn.ModuleDict"
            )


def norms_that_stay(model: nn.Module) -> list[str]:
    """Return the places of modules that hold batch norms and that the model has in containers, not as modules."""
    return [
        place
        for place, module in _unregistered(model)
        if any(isinstance(inside, BATCH_NORMS) for inside in module.modules())
    ]


def _unregistered(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in attributes that are containers, and are not among those of the model; with the attribute."""
    registered = set(model.modules())
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            for found in _modules_in(value, set()):
                if found not in registered:
                    yield f"{name}.{attribute}" if name else attribute, found


def _modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules in nested containers."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in seen:
        seen.add(id(value))
        for item in list(value.values()) if isinstance(value, Mapping) else value:
            yield from _modules_in(item, seen)

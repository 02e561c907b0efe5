"""Replacing modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def slots(model: nn.Module) -> dict[tuple[nn.Module, str], nn.Module]:
    """Return what each attribute (parent, name) of ``model`` holds; a shared module is in several."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [(path, *path.rpartition(".")[::2]) for path in modules if path]
    return {(modules[parent], name): modules[path] for path, parent, name in paths}


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Put each replacement wherever its module is in ``model``; return each (parent, name, replacement)."""
    done = [(*slot, replacements[module]) for slot, module in slots(model).items() if module in replacements]
    for parent, name, replacement in done:
        parent.register_module(name, replacement)
    return done


WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def wrapper_of(module: nn.Module) -> str | None:
    """Return the wrapper for distributed training that ``module`` is, by name."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in WRAPPERS), None)


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is wrapped for distributed training, which would miss new parameters."""
    found = next(filter(None, map(wrapper_of, model.modules())), None)
    if found is not None:
        raise ValueError(f"model is in {found}, which does not see parameters that are added later; wrap it afterwards")

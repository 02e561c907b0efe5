"""Every use of PyTorch's private names. Each has a fallback for a PyTorch without the name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

pytree: Any = getattr(torch.utils, "_pytree", None)

# Of modules


def children(module: nn.Module) -> Mapping[str, Any]:
    """The children of ``module`` by name. An attribute would be looked for among parameters and buffers first."""
    try:
        return module.__dict__["_modules"]
    except KeyError:
        return dict(module.named_children())


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The attributes in which ``module`` has its hooks, whichever of them there are: dictionaries, and one flag."""
    return {name: value for name, value in vars(module).items() if "hook" in name}


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward of ``module`` runs hooks."""
    return any(isinstance(value, dict) and value for name, value in hooks_of(module).items() if "state" not in name)


def batch_norm_types() -> tuple[type[nn.Module], ...]:
    """The base of all batch norms, or its public subclasses."""
    public = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    lazy = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
    base = getattr(nn.modules.batchnorm, "_BatchNorm", None)
    return (*public, *lazy) if base is None else (base,)


def base_of(x: Tensor) -> Tensor:
    """The tensor that ``x`` is a view of; ``x`` itself if it is no view, or if PyTorch does not tell."""
    base = getattr(x, "_base", None)
    return x if base is None else base


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested containers; the fallback knows tuples, lists and mappings."""
    if pytree is not None:
        return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return [values] if isinstance(values, Tensor) else []


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Apply ``function`` to the tensors in nested containers; the fallback knows tuples, lists and dicts."""
    if pytree is not None:
        return pytree.tree_map_only(Tensor, function, values)
    if isinstance(values, dict):
        return type(values)((name, map_tensors(function, value)) for name, value in values.items())
    if isinstance(values, (tuple, list)):
        mapped = [map_tensors(function, value) for value in values]
        return type(values)(*mapped) if hasattr(values, "_fields") else type(values)(mapped)
    return function(values) if isinstance(values, Tensor) else values

"""What is given for a model: a module, and none that stands around one for distributed training."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["check_module", "check_not_wrapped", "wrapper_of"]

WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def wrapper_of(module: nn.Module) -> str | None:
    """Return the wrapper for distributed training that ``module`` is, by name."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in WRAPPERS), None)


def check_module(model: Any) -> None:
    """Raise TypeError if ``model`` is no module."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model must be a torch.nn.Module; got {what}")


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is wrapped for distributed training, which would miss new parameters."""
    found = next(filter(None, map(wrapper_of, model.modules())), None)
    if found is not None:
        raise ValueError(f"model is in {found}, which does not see parameters that are added later; wrap it afterwards")

"""Modules that take others' places in a model."""

from __future__ import annotations

from torch import nn


def replace(model: nn.Module, stand_ins: dict[nn.Module, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put each stand-in wherever its module stands in ``model``; return the places: parent, name and stand-in."""
    places = [
        (parent, name, stand_ins[child])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in stand_ins
    ]
    for parent, name, stand_in in places:
        parent._modules[name] = stand_in
    return places


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is wrapped for distributed training, which knows the parameters it had then."""
    wrappers = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    for module in model.modules():
        found = wrappers.intersection(kind.__name__ for kind in type(module).__mro__)
        if found:
            raise ValueError(
                f"model is in {found.pop()}, which goes on with the parameters it knows; wrap it afterwards"
            )

"""Which modules of a model get VCL: its activations, or what ``layers`` and ``after`` name."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from torch import nn

from .modules import VCLActivation
from .recognise import Recognised, UnknownError, recognise, settings_of

__all__ = ["Choice", "Layers", "choose"]

Layers = Iterable[str | nn.Module] | Callable[[str, nn.Module], bool]


class Choice(NamedTuple):
    """Modules by name. All but ``behind`` are of those whose inputs VCL may be for."""

    before: dict[str, nn.Module]
    behind: dict[str, nn.Module]
    unknown: dict[str, nn.Module]  # an example's run must show what they take, to tell whether they are activations
    recognised: dict[nn.Module, Recognised]  # all activation modules, chosen or not


def choose(model: nn.Module, layers: Layers | None, after: Layers | None) -> Choice:
    """Return the choice. Raise ValueError where ``layers`` or ``after`` names what cannot have VCL."""
    modules: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, VCLActivation) and "parametrizations" not in name.split(".")
    }
    recognised, unknown = _recognised(modules)
    behind = {} if after is None else _named("after", modules, after)
    if layers is None:
        before = {name: module for name, module in modules.items() if module in recognised}
    else:
        before, unknown = _named("layers", modules, layers), {}
        if not before and not behind:
            raise ValueError("layers must choose at least one module of the model; it chose none")
    both = set(before.values()) & set(behind.values())
    for name, module in behind.items():
        if module in both and layers is not None:
            raise ValueError(f"{name!r} is in layers= and in after=; choose one, its input or its output")
    before = {name: module for name, module in before.items() if module not in both}
    for name, module in {**before, **behind}.items():
        if hasattr(module, "vcl"):
            raise ValueError(
                f"{name!r} has an attribute 'vcl' already, the name that attach needs. Remove an earlier attach, or "
                "leave the module out with layers="
            )
    unknown = {name: module for name, module in unknown.items() if name not in behind}
    return Choice(before, behind, unknown, recognised)


def _recognised(modules: dict[str, nn.Module]) -> tuple[dict[nn.Module, Recognised], dict[str, nn.Module]]:
    """Return the activation modules, and those that take no drawn tensor. Equal modules are tried once."""
    recognised: dict[nn.Module, Recognised] = {}
    unknown: dict[str, nn.Module] = {}
    found: dict[Hashable, Recognised | None] = {}
    for name, module in modules.items():
        key = _what_it_computes(module) or name
        try:
            if key not in found:
                found[key] = recognise(module)
        except UnknownError:
            unknown[name] = module
            continue
        if found[key] is not None:
            recognised[module] = found[key]  # type: ignore[assignment]
    return recognised, unknown


def _what_it_computes(module: nn.Module) -> Hashable | None:
    """Return what modules that compute the same have in common; None if that is not known."""
    parts = (*module.children(), *module.parameters(), *module.buffers())
    settings = None if parts else settings_of(module)
    key = (type(module), getattr(module, "inplace", None), settings)
    try:
        hash(key)
    except TypeError:
        return None
    return None if settings is None else key


def _named(argument: str, modules: dict[str, nn.Module], layers: Layers) -> dict[str, nn.Module]:
    chosen: dict[str, nn.Module] = {}
    if callable(layers):
        chosen = {name: module for name, module in modules.items() if layers(name, module)}
    else:
        names = {module: name for name, module in modules.items()}
        for layer in [layers] if isinstance(layers, str) else layers:
            # A name may be that of a call: "act:1"
            name = re.sub(r":\d+$", "", layer) if isinstance(layer, str) else names.get(layer, "")
            if name not in modules:
                raise ValueError(f"{argument} must name modules of the model; got {layer!r}")
            chosen[name] = modules[name]
    for name, module in chosen.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or (
            argument == "layers" and isinstance(module, nn.Sequential)
        ):
            raise ValueError(f"{argument} must not name a container; {name!r} is one: name a module inside it")
    if argument == "after" and not chosen:
        raise ValueError("after must choose at least one module of the model; it chose none")
    return chosen

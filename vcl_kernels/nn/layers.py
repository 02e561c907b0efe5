"""The layers that a monitor watches."""

from __future__ import annotations

from torch import nn

from ..torch_private import plain_name
from .fused import Calls
from .modules import VCLActivation
from .recognise import is_activation

__all__ = ["is_behind", "layers_of", "vcls_of"]


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules to watch, by name. A VCL that attach gave to another module is watched there."""
    attached = {vcl for calls in model.modules() if isinstance(calls, Calls) for vcl in calls}
    layers = [
        (plain_name(name) or type(model).__name__, module)
        for name, module in model.named_modules()
        if module not in attached and (vcls_of(module) or is_activation(module))
    ]
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no activation or VCL module to monitor")
    return layers


def vcls_of(module: nn.Module) -> list[VCLActivation]:
    """Return ``module`` if it is a VCL, else those that attach gave it."""
    if isinstance(module, VCLActivation):
        return [module]
    calls = getattr(module, "vcl", None)
    return list(calls) if isinstance(calls, Calls) else []  # type: ignore[arg-type]


def is_behind(module: nn.Module) -> bool:
    """Whether ``module`` has VCL of its output."""
    calls = getattr(module, "vcl", None)
    return isinstance(calls, Calls) and calls.behind

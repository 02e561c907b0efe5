"""The layers that a monitor watches."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from ..torch_private import plain_name
from .fused import Calls
from .modules import VCLActivation
from .recognise import is_activation
from .report import unseen_by_checkpoints

__all__ = ["Layers", "is_behind", "vcls_of"]


class Layers:
    """The modules of a model that are watched. They may change: VCL is attached, or a module is replaced.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.activations: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # those known; to try one takes long
        if not self.find():
            raise ValueError(f"model ({type(model).__name__}) has no activation or VCL module to monitor")

    def find(self) -> dict[nn.Module, str]:
        """Return the modules to watch, with their names. A VCL that attach gave to another module is watched there."""
        attached = {vcl for calls in self.model.modules() if isinstance(calls, Calls) for vcl in calls}
        return {
            module: plain_name(name) or type(self.model).__name__
            for name, module in self.model.named_modules()
            if module not in attached and (vcls_of(module) or self._is_activation(module))
        }

    def _is_activation(self, module: nn.Module) -> bool:
        known = self.activations.get(module)
        if known is None:
            with unseen_by_checkpoints():
                known = self.activations[module] = is_activation(module)
        return known


def vcls_of(module: nn.Module) -> list[VCLActivation]:
    """Return ``module`` if it is a VCL, else those that attach gave it."""
    if isinstance(module, VCLActivation):
        return [module]
    return list(_calls_of(module) or ())  # type: ignore[arg-type]


def is_behind(module: nn.Module) -> bool:
    """Whether ``module`` has VCL of its output."""
    calls = _calls_of(module)
    return calls is not None and calls.behind


def _calls_of(module: nn.Module) -> Calls | None:
    for name, child in module.named_children():  # ``vcl`` of another module may be a property that raises
        if name == "vcl" and isinstance(child, Calls):
            return child
    return None

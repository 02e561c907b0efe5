"""The parts of a model that are followed in copies of it, and what keeps a trial away from the model itself."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .norms import own_names

__all__ = ["Parts", "ReachedError", "TripWire", "same_random_numbers", "tell_readings"]


class Parts:
    """The modules of a model that are followed: its batch norms, and layers whose outputs may go to one."""

    def __init__(self, model: nn.Module, norms: Mapping[nn.Module, str], layers: tuple[type[nn.Module], ...]) -> None:
        self.model, self.norms = model, norms
        self.layers = {
            module
            for module in model.modules()
            if isinstance(module, layers) and not any(inside in norms for inside in module.modules())
        }
        # Attributes that change when batch norms are removed
        self.names = {norm: own_names(norm) for norm in norms} | {layer: {"weight", "bias"} for layer in self.layers}
        # An attribute of a norm that something else than the norm reads, in any forward, also one that raises
        self.reads: dict[nn.Module, str] = {}


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Seed the random numbers of torch, Python and numpy; set them back afterwards."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed all devices
            for index in devices:
                with torch.cuda.device(index):
                    torch.cuda.manual_seed(0)
            random.seed(0)
            if numpy is not None:
                numpy.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


class ReachedError(RuntimeError):
    """A forward of a copy reached the model itself: it shows nothing of the model."""

    def __init__(self) -> None:
        super().__init__("the forward reaches the model itself, not the copy that is tried, through what it holds")


class TripWire:
    """While entered, a call of a norm or layer of the model itself raises, and so does reading its parameters.

    Copies run, and a function or a weak reference that they hold may lead to the model.

    Raises:
        ReachedError: at the end too, if the forward caught it.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.reached = parts, False
        self.kinds: dict[nn.Module, type] = {}

    def __enter__(self) -> TripWire:
        try:
            for module, names in self.parts.names.items():
                if module in self.parts.layers and not type(module).__module__.startswith("torch."):
                    continue  # a user's layer does not change
                self.kinds[module] = type(module)
                trip = partial(self._trip, module)
                tell_readings(module, names, trip, {"forward": partial(trip, "forward")})
        except Exception:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for module, kind in self.kinds.items():
            object.__setattr__(module, "__class__", kind)
        if self.reached:
            raise ReachedError from None

    def _trip(self, module: nn.Module, name: str, *_args: Any, **_kwargs: Any) -> Any:
        self.reached = True
        if module in self.parts.norms and name != "forward":
            self.parts.reads.setdefault(module, name)
        raise ReachedError


def tell_readings(module: nn.Module, names: set[str], tell: Callable[[str], Any], more: dict[str, Any]) -> None:
    """Change the class of ``module`` to one that tells when ``names`` are read, and has ``more`` attributes."""
    kind = type(module)

    def read(module: nn.Module, name: str) -> Any:
        if name in names:
            tell(name)
        return kind.__getattribute__(module, name)

    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"__getattribute__": read, **more}))

"""The parts of a model that are followed in copies of it, and what keeps a trial away from the model itself."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .norms import own_names

__all__ = ["Change", "Parts", "Redirect", "Twins", "change_class", "same_random_numbers"]

Twins = Mapping[nn.Module, nn.Module]  # the modules of a copy by those of the model
Change = Callable[[Twins], None]  # of a copy


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


class Redirect:
    """While entered, calls of the model's norms and layers, and readings of what they have, go to a copy's.

    The copy runs, and a function or a weak reference that it holds may lead to the model.

    Args:
        parts: those of the model.
        twins: those of the copy.
    """

    def __init__(self, parts: Parts, twins: Twins) -> None:
        self.parts, self.twins = parts, twins
        self.kinds: dict[nn.Module, type] = {}

    def __enter__(self) -> None:
        try:
            for module, names in self.parts.names.items():
                if module in self.parts.layers and not type(module).__module__.startswith("torch."):
                    continue  # a user's layer does not change
                self.kinds[module] = type(module)
                self._redirect(module, self.twins[module], names)
        except BaseException:  # an interrupt too
            self.__exit__()
            raise

    def __exit__(self, *_error: object) -> None:
        for module, kind in self.kinds.items():
            object.__setattr__(module, "__class__", kind)

    def _redirect(self, module: nn.Module, twin: nn.Module, names: set[str]) -> None:
        kind = type(module)

        def read(module: nn.Module, name: str) -> Any:
            return getattr(twin, name) if name in names else kind.__getattribute__(module, name)

        change_class(
            module,
            __getattribute__=read,
            __call__=lambda _, *args, **kwargs: twin(*args, **kwargs),
            forward=lambda _, *args, **kwargs: twin.forward(*args, **kwargs),
        )


def change_class(module: nn.Module, **attributes: Any) -> None:
    """Give ``module`` a class of its own with other ``attributes``."""
    kind = type(module)
    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), attributes))

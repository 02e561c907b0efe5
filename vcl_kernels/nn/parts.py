"""The parts of a model that are followed in copies of it, and what keeps a trial away from the model itself."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .norms import own_names
from .trial import model_copy

__all__ = [
    "OTHER_DEPENDENCY",
    "Change",
    "OriginalCalledError",
    "Parts",
    "Redirect",
    "Twins",
    "change_class",
    "copy_of",
    "error_text",
    "same_random_numbers",
]

Twins = Mapping[nn.Module, nn.Module]  # the modules of a copy by those of the model
Change = Callable[[Twins], None]  # of a copy

OTHER_DEPENDENCY = "Something in it depends on them in another way than by calls. The model is unchanged"


def error_text(error: Exception) -> str:
    """Return the type and text of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


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


def copy_of(parts: Parts, training: bool) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Return a copy of the model in a mode, and its modules by those of the model.

    Batch norms are in evaluation in both modes: a batch of one sample has no statistics.
    """
    copied = model_copy(parts.model)
    twins = dict(zip(parts.model.modules(), copied.modules(), strict=True))
    for own, twin in twins.items():
        twin.training = training and own not in parts.norms
    return copied, twins


class OriginalCalledError(RuntimeError):
    """A forward of a copy calls a module of the model itself, so that it shows nothing of the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(f"it reaches a {type(module).__name__} of the model itself, and not of the copy that is tried")


class Redirect:
    """While entered, the model's norms and layers stand for those of a copy: for calls, and readings of what changes.

    The copy runs, and a function or a weak reference that it holds may lead to the model. All modules of the model have
    the copy's mode meanwhile. Calls of others than norms and layers raise :class:`OriginalCalledError`.

    Args:
        parts: those of the model.
        twins: those of the copy.
    """

    def __init__(self, parts: Parts, twins: Twins) -> None:
        self.parts, self.twins = parts, dict(twins)
        self.original_classes: dict[nn.Module, type] = {}
        self.modes = [(module, module.training) for module in twins]
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        try:
            self.hooks.append(register_module_forward_pre_hook(self._refuse))
            for module, twin in self.twins.items():
                module.training = twin.training
            for module, names in self.parts.names.items():
                self.original_classes[module] = type(module)
                with suppress(TypeError, AttributeError):  # a class that allows no subclass
                    self._redirect(module, names)
        except BaseException:  # an interrupt too
            self.__exit__()
            raise

    def __exit__(self, *_error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for module, kind in self.original_classes.items():
            object.__setattr__(module, "__class__", kind)
        for module, training in self.modes:
            module.training = training
        self.twins = {}  # the classes that refer to this live until they are collected

    def _refuse(self, module: nn.Module, _args: Any) -> None:
        if module in self.twins:
            raise OriginalCalledError(module)

    def _redirect(self, module: nn.Module, names: set[str]) -> None:
        kind = type(module)

        def read(module: nn.Module, name: str) -> Any:
            return getattr(self.twins[module], name) if name in names else kind.__getattribute__(module, name)

        change_class(
            module,
            __getattribute__=read,
            __call__=lambda module, *args, **kwargs: self.twins[module](*args, **kwargs),
            forward=lambda module, *args, **kwargs: self.twins[module].forward(*args, **kwargs),
        )


def change_class(module: nn.Module, **attributes: Any) -> None:
    """Give ``module`` a class of its own with other ``attributes``."""
    kind = type(module)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    object.__setattr__(module, "__class__", type(kind.__name__, (kind,), names | attributes))

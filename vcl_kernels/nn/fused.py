"""The modules that attach puts into a model: the VCL of each call of a module, fused with it or in front of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_activation
from ..torch_private import children, hooks_of
from .modules import VCL, VCLActivation

__all__ = ["Calls", "FusedActivation", "before_activation", "can_fuse", "first_input", "vcl_for"]

# For each activation that can be fused: its name in vcl_activation, and the module's attributes that are settings.
FUSED: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.Tanh: ("tanh", ()),
}


class CallCounter:
    """The calls of one activation module in a forward of the model."""

    count = 0
    in_forward = False  # of the whole model, not of a part of it or a recomputation


class Calls(nn.ModuleList):
    """One VCL for each call of one activation module in a forward: a model may use the module more than once."""

    def __init__(self, vcls: Iterable[VCLActivation]) -> None:
        super().__init__(vcls)
        self.counter = CallCounter()

    def _replicate_for_data_parallel(self) -> Calls:
        replica = super()._replicate_for_data_parallel()
        replica.counter = CallCounter()
        return replica

    def begin(self) -> None:
        """Begin a forward of the model. Drop the losses of the previous one: a layer may be skipped this time."""
        self.counter.count, self.counter.in_forward = 0, True
        for vcl in self:
            vcl.latest.loss = None  # type: ignore[union-attr]

    def end(self) -> None:
        """End the forward of the model."""
        self.counter.in_forward = False

    def take(self, module: nn.Module) -> VCLActivation:
        """Return the VCL of the present call of ``module``."""
        counter, vcls = self.counter, children(self)
        call = counter.count
        if not counter.in_forward:
            if len(vcls) > 1 and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{_type_name(module)} is called more than once in a forward, and now outside one (by "
                    "checkpointing, or by a part of the model used alone): which beta is meant? Give each call a "
                    "module of its own"
                )
            call %= len(vcls)
        elif call >= len(vcls):
            raise RuntimeError(
                f"{_type_name(module)} is called {call + 1} times in one forward, and has VCL for {len(vcls)}; "
                "give attach an example_input whose forward makes every call, so that each gets a beta of its own"
            )
        counter.count = call + 1
        return vcls[str(call)]


class FusedActivation(nn.Module):
    """Replaces an activation module: VCLActivation in training, the original module in evaluation.

    The original is no child, so that the state dict gains only betas. This module has its hooks, and its attributes.
    """

    original: nn.Module
    vcl: Calls

    def __init__(self, original: nn.Module, calls: Calls) -> None:
        super().__init__()
        self.__dict__.update(hooks_of(original), original=original)
        self.vcl = calls
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of ``input``, an argument named as in torch.nn."""
        if not self.training:
            return self.original.forward(input)
        return children(self)["vcl"].take(self)(input)

    def release(self) -> nn.Module:
        """Return the original module, with the mode and the hooks of this one."""
        self.original.__dict__.update(hooks_of(self))
        return self.original.train(self.training)

    def __getattr__(self, name: str) -> Any:
        """Look for an attribute here, then in the original module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute here; a setting of the original module is set there and in the VCLs."""
        original = self.__dict__.get("original")
        if original is None or name == "training" or name.startswith("_") or name not in vars(original):
            super().__setattr__(name, value)
            return
        setattr(original, name, value)
        activation = check_activation(**_activation_settings(original))
        for vcl in self.vcl:
            vcl.activation = activation  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """Return the original module's repr."""
        return repr(self.original)


def before_activation(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pass the first input of ``module`` through its VCL. A hook that is a plain function: models can be copied."""
    calls: Calls = module.vcl  # type: ignore[assignment]
    if not calls.training:
        return None
    x = calls.take(module)(first_input(args, kwargs))
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, positional or not."""
    return args[0] if args else next(iter(kwargs.values()))


def can_fuse(module: nn.Module) -> bool:
    """Whether ``module`` is one of PyTorch's activations that are fused, with PyTorch's forward."""
    return type(module) in FUSED and "forward" not in vars(module)


def vcl_for(module: nn.Module, settings: dict[str, Any]) -> VCLActivation:
    """Return the VCL for one call of ``module``: fused with its activation where possible."""
    return VCLActivation(**_activation_settings(module), **settings) if can_fuse(module) else VCL(**settings)


def _activation_settings(module: nn.Module) -> dict[str, Any]:
    """The arguments of VCLActivation that say which activation ``module`` is."""
    activation, names = FUSED[type(module)]
    return {"activation": activation, **{name: getattr(module, name) for name in names}}


def _type_name(module: nn.Module) -> str:
    return type(module.original if isinstance(module, FusedActivation) else module).__name__

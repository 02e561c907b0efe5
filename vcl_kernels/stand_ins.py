"""What attach puts in a model's places: the VCL of every call of a module, fused with it or before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_activation
from .modules import VCL, VCLActivation
from .options import Activation

__all__ = ["Calls", "FusedActivation", "before_activation", "can_fuse", "vcl_for"]

# What vcl_activation has: the activation's name, and those of its settings by the module's attributes.
FUSED: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.Tanh: ("tanh", ()),
}


class Turn:
    """Where a forward of the whole model has got to with one activation module."""

    next = 0  # call of the activation module
    inside = False  # a forward of the whole model


class Calls(nn.ModuleList):
    """The VCL of each call of one activation module within a forward (a module may be used more than once)."""

    def __init__(self, modules: Iterable[VCLActivation]) -> None:
        super().__init__(modules)
        self.turn = Turn()

    def _replicate_for_data_parallel(self) -> Calls:
        replica = super()._replicate_for_data_parallel()
        replica.turn = Turn()
        return replica

    def begin(self) -> None:
        """Forget the last forward: a layer that is skipped now must not add its old loss."""
        turn = self.turn
        turn.next, turn.inside = 0, True
        for vcl in self:
            vcl.latest.loss = None  # type: ignore[union-attr]

    def end(self) -> None:
        """Leave the model's forward; what calls now is a recomputation, or a part of the model used alone."""
        self.turn.inside = False

    def take(self, module: nn.Module) -> VCLActivation:
        """Return the VCL of the call that is being made."""
        turn, vcls = self.turn, self._modules
        call = turn.next
        if len(vcls) > 1 and not turn.inside and torch.is_grad_enabled():
            raise RuntimeError(
                f"{_type_name(module)} is called more than once in a forward, and now outside one (by checkpointing, "
                "or by a part of the model used alone): which beta is meant? Give each call a module of its own"
            )
        if call >= len(vcls):
            if turn.inside:
                raise RuntimeError(
                    f"{_type_name(module)} is called {call + 1} times in one forward, and has VCL for {len(vcls)}; "
                    "give attach an example_input whose forward makes every call, so that each gets a beta of its own"
                )
            call = 0
        turn.next = call + 1
        return vcls[str(call)]  # type: ignore[return-value]


class FusedActivation(nn.Module):
    """Stands where an activation module stood: VCLActivation in training, that module in evaluation.

    The module is not a child, so that the state dict gains the betas alone; the hooks that it has are run here, and
    its attributes are found here.
    """

    original: nn.Module
    vcl: Calls

    def __init__(self, original: nn.Module, calls: Calls) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(original).items() if "hook" in name})
        self.__dict__["original"] = original
        self.vcl = calls
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of ``input``, which has the name that it has in torch.nn."""
        if not self.training:
            return self.original.forward(input)
        calls: Calls = self._modules["vcl"]  # type: ignore[assignment]  # self.vcl is looked for in three places first
        return calls.take(self)(input)

    def __getattr__(self, name: str) -> Any:
        """Look a name up here, and then in the module that this stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is a setting of the module that this stands for there, and in its VCLs."""
        original = self.__dict__.get("original")
        if original is None or name == "training" or name.startswith("_") or name not in vars(original):
            super().__setattr__(name, value)
            return
        setattr(original, name, value)
        for vcl in self.vcl:
            vcl.activation = activation_of(original)  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """Return what this stands for."""
        return repr(self.original)


def before_activation(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let what enters ``module`` pass its VCL: a hook, and a plain function, so that a model can be copied."""
    calls: Calls = module.vcl  # type: ignore[assignment]
    if not calls.training:
        return None
    if args:
        return (calls.take(module)(args[0]), *args[1:]), named
    first = next(iter(named))
    return args, {**named, first: calls.take(module)(named[first])}


def can_fuse(module: nn.Module) -> bool:
    """Whether ``module`` is one of PyTorch's activations that are fused, and its forward is still PyTorch's."""
    return type(module) in FUSED and "forward" not in vars(module)


def vcl_for(module: nn.Module, settings: dict[str, Any]) -> VCLActivation:
    """The VCL of one call of ``module``: fused with it if it can be, else one that stands before it."""
    if not can_fuse(module):
        return VCL(**settings)
    activation, own = _fused(module)
    return VCLActivation(activation, **own, **settings)


def activation_of(module: nn.Module) -> Activation:
    """What kernels are told of a module that can be fused."""
    activation, own = _fused(module)
    return check_activation(activation, **own)


def _fused(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The activation's name and settings of a module that can be fused."""
    activation, names = FUSED[type(module)]
    return activation, {name: getattr(module, name) for name in names}


def _type_name(module: nn.Module) -> str:
    return type(module.original if isinstance(module, FusedActivation) else module).__name__

"""What attach gives to a module: a VCL for each of its calls, fused with it, before it or behind it.

The module itself stays where it is, so that it is found on every way on which the model reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import has_transform, in_backward
from .modules import VCLActivation
from .recognise import comparable, matching, settings_of
from .steering import ENOUGH_FORWARDS, Steering
from .trial import trial_copy

__all__ = ["Calls", "first_input", "fuse", "put_before", "put_behind"]


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class CallCounter:
    """The calls of one module in a forward of the model."""

    count = 0


class Calls(nn.ModuleList):
    """The VCLs of one module: one for each of its calls in a forward of the model, or one for all of them."""

    behind = False  # the module: they are of its output

    def __init__(self, vcls: Iterable[VCLActivation], steering: Steering, name: str, shared_beta: bool) -> None:
        super().__init__(vcls)
        self.in_order: tuple[VCLActivation, ...] = tuple(self)  # type: ignore[arg-type]  # a look-up takes longer
        self.counter = CallCounter()
        self.name, self.shared_beta = name, shared_beta
        self.owner: tuple[nn.Module, ...] = ()  # the fused module, as no child
        self.settings: tuple[tuple[str, Any], ...] = ()  # of it: by which its function may change
        for call, vcl in enumerate(self):
            vcl.steering = steering  # type: ignore[assignment]
            vcl.place = f"{name}:{call}" if call else name  # type: ignore[assignment]
            vcl.sums_calls = shared_beta  # type: ignore[assignment]

    def begin(self) -> None:
        """Begin a forward of the model. Drop the losses of the previous one: a layer may be skipped this time."""
        self.counter.count = 0
        for vcl in self.in_order:
            latest = vcl.latest
            latest.loss, latest.read = None, False
            latest.recomputes = False  # a recomputation may stop before its end

    def take(self, x: Tensor) -> VCLActivation | None:
        """Return the VCL of the present call, whose input is ``x``. None where there is to be none:

        VCL is paused, or x needs no gradient (a frozen part). Where the whole forward runs without grad mode, losses
        are still computed, to look at.
        """
        steering = self.in_order[0].steering  # through a VCL: compiled code checks each way to an object, and slowly
        if not steering.in_forward:
            return self._take_outside(x)
        if steering.pauses:
            return None
        counter, vcls = self.counter, self.in_order
        call_before = counter.count
        call = 0 if self.shared_beta else call_before
        if call >= len(vcls):
            raise RuntimeError(
                f"layer {self.name!r} is called {call + 1} times in one forward, and has VCL for {len(vcls)}. Use "
                "shared_beta=True for a number of calls that varies, or attach with an example_input whose forward "
                "makes every call"
            )
        counter.count = call + 1
        vcl = vcls[call]
        if not steering.began_in_grad_mode:
            return vcl
        acts, latest = _wants_gradient(x), vcl.latest
        if not (self.shared_beta and call_before and latest.acts):  # one of its calls will be run again
            latest.acts = acts
        return vcl if acts else None

    def _take_outside(self, x: Tensor) -> VCLActivation | None:
        """The same outside a forward of the whole model: in a checkpoint's recomputation, or a part that runs alone."""
        vcls, recomputes, wanted = self.in_order, in_backward(), _wants_gradient(x)
        steering = vcls[0].steering
        if steering.forwards.run_again() if recomputes else steering.pauses_part():
            return None
        if len(vcls) > 1 and wanted:
            raise RuntimeError(
                f"layer {self.name!r} has a beta for each of its calls in a forward. Now it runs outside the model's "
                "forward (in checkpointing, or in a part that is called alone), so that the call is unknown. Give each "
                "call a module of its own, or attach with shared_beta=True"
            )
        vcl = vcls[0]
        if not recomputes:
            self._begin_part(vcl, wanted)
        elif vcl.latest.acts is False:  # of a part that is frozen
            return None
        elif vcl.latest.acts:
            vcl.latest.recomputes = True
        elif wanted and not steering.inject:
            steering.warn(
                "reentrant",
                f"layer {vcl.place!r} runs under reentrant checkpointing, in which its VCL loss has no gradient and is "
                "left out of handle.loss(). Use checkpoint(..., use_reentrant=False), or attach(..., inject=True)",
            )
            return None
        return vcl if wanted else None

    def _begin_part(self, vcl: VCLActivation, wanted: bool | None) -> None:
        """Begin a call in a part of the model that runs alone."""
        latest, steering = vcl.latest, vcl.steering
        steering.begin_part()
        if latest.read:
            latest.read, latest.loss, latest.replaced = False, None, 0
        latest.recomputes = False
        if latest.loss is None or wanted:
            latest.acts = wanted
        if latest.loss is not None and wanted and not vcl.sums_calls:
            latest.replaced = min(latest.replaced + 1, ENOUGH_FORWARDS)
            steering.lose(latest.replaced)


def _wants_gradient(x: Any) -> bool | None:
    """Whether a gradient of ``x`` may be wanted. None without grad mode: a reentrant checkpoint may want it later."""
    return (getattr(x, "requires_grad", True) or has_transform(x, None)) if torch.is_grad_enabled() else None


def fuse(module: nn.Module, calls: Calls) -> list[Callable[[], Any]]:
    """Give ``module`` a forward in which VCL and the activation are one in training; return what undoes it."""
    calls.settings, calls.owner = settings_of(module) or (), (module,)
    module.forward = partial(_fused_forward, calls)
    return [*_add_calls(module, calls), partial(_delete_own, module, "forward", _fused_forward)]


def put_before(module: nn.Module, calls: Calls, *, copies: bool = False) -> list[Callable[[], Any]]:
    """Put VCL before ``module``, of its input (``copies``: of a copy, which the module may overwrite)."""
    hook = module.register_forward_pre_hook(_before_copying if copies else _before, with_kwargs=True)
    undo = [*_add_calls(module, calls), hook.remove]
    if getattr(module, "inplace", False):
        module.inplace = False  # type: ignore[assignment]
        undo.append(partial(setattr, module, "inplace", True))
    return undo


def put_behind(module: nn.Module, calls: Calls) -> list[Callable[[], Any]]:
    """Put VCL behind ``module``, of its output."""
    calls.behind = True
    return [*_add_calls(module, calls), module.register_forward_hook(_behind).remove]


def _add_calls(module: nn.Module, calls: Calls) -> list[Callable[[], Any]]:
    module.vcl = calls.train(module.training)
    return [partial(_delete_calls, module)]


def _delete_calls(module: nn.Module) -> None:
    calls = getattr(module, "vcl", None)
    if isinstance(calls, Calls):
        calls.eval()  # if others hold its forward, that is the module's own from now on
        del module.vcl


def _delete_own(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    if getattr(vars(module).get(name), "func", None) is function:  # others may have set it since
        delattr(module, name)


def _fused_forward(calls: Calls, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a fused module, bound to its Calls: a plain function, so that models can be copied."""
    if calls.training:
        if calls.settings:
            _match_changed(calls)
        x = first_input(args, kwargs)
        vcl = calls.take(x)
        if vcl is not None:
            return vcl(x)
    module = calls.owner[0]
    return type(module).forward(module, *args, **kwargs)


def _match_changed(calls: Calls) -> None:
    """Take over settings that were changed since attach."""
    module = calls.owner[0]
    if all(comparable(getattr(module, name, None)) == value for name, value in calls.settings):
        return
    plain = trial_copy(module, None)
    del plain.__dict__["forward"]
    activation = matching(plain)
    if activation is None:
        raise RuntimeError(
            f"layer {calls.name!r} ({type(module).__name__}) was changed after attach, and is none of the activations "
            "that are fused any more. Call handle.remove(), and attach again"
        )
    for vcl in calls:
        vcl.activation = activation  # type: ignore[assignment]
    calls.settings = settings_of(plain) or ()


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Pass the first input of ``module`` through its VCL."""
    calls: Calls = module.vcl  # type: ignore[assignment]
    x = first_input(args, kwargs)
    vcl = calls.take(x) if calls.training else None
    return None if vcl is None else _with_first_input(vcl(x), args, kwargs)


def _before_copying(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """The same for a module that overwrites its input."""
    passed = _before(module, args, kwargs)
    return None if passed is None else _with_first_input(first_input(*passed).clone(), *passed)


def _behind(module: nn.Module, _args: tuple[Any, ...], y: Any) -> Any:
    """Pass the output of ``module`` through its VCL."""
    calls: Calls = module.vcl  # type: ignore[assignment]
    vcl = calls.take(y) if calls.training else None
    return None if vcl is None else vcl(y)


def _with_first_input(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, positional or not."""
    return args[0] if args else next(iter(kwargs.values()))

"""One forward of a model that a monitor looks at: hooks of the layers, which record each of their calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from ..checks import channels_first
from ..torch_private import in_backward, is_replica, remove_hooks
from .fused import first_input
from .layers import is_behind, vcls_of
from .modules import VCLActivation
from .report import Report
from .rows import Row, Rows
from .share import Share
from .statistics import acting_beta, of_input, of_vcl, why_not
from .undo import Hooks

__all__ = ["Look", "Settings"]


class Settings(NamedTuple):
    """What a monitor was asked for."""

    every: int
    sub_batch_size: int | None
    unit: str | None
    channel_dim: int | None


class Call:
    """A call of a layer that runs, or its latest one."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.seen = False  # its input; it has no row if that cannot be looked at
        self.row: Row | None = None
        self.vcl: VCLActivation | None = None  # that acts
        self.loss_before: Tensor | None = None  # of earlier calls, where they are summed
        self.share: Share | None = None


class Look:
    """One forward. Statistics are of what the layer's VCL gets, or without one of what the layer itself gets.

    A copy of the model has a copy of this, which does nothing and goes at its first call.

    Attributes:
        layers: the names of those that are watched.
        counts: how often each was called so far.
        rows_here: the rows of this forward.
    """

    over = True

    def __init__(self, step: int, settings: Settings, rows: Rows, report: Report, hooks: Hooks) -> None:
        self.step, self.settings = step, settings
        self.rows, self.report, self.hooks = rows, report, hooks
        self.over = False
        self.layers: dict[nn.Module, str] = {}
        self.layer_of: dict[VCLActivation, nn.Module] = {}
        self.counts: dict[str, int] = {}
        self.calls: dict[nn.Module, Call] = {}
        self.rows_here: list[Row] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copy one that does nothing."""
        return {}

    def begin(self, layers: dict[nn.Module, str], outer: nn.Module) -> None:
        """Hook the layers. The hooks of ``outer``, whose forward has begun, cannot change any more."""
        self.layers = layers
        self.layer_of = {vcl: module for module in self.layers for vcl in vcls_of(module)}
        for module, name in layers.items():
            if module is not outer:
                self._note(module)
                module.register_forward_pre_hook(partial(self.begin_call, name), prepend=True)
                if is_behind(module):
                    module.register_forward_hook(self.see_output)
                else:
                    module.register_forward_pre_hook(self.see_input, with_kwargs=True)
        for vcl in self.layer_of:
            if vcl is not outer:
                self._note(vcl)
                vcl.register_forward_pre_hook(self.before_vcl, with_kwargs=True)
                vcl.register_forward_hook(self.after_vcl)

    def _note(self, module: nn.Module) -> None:
        self.hooks.of_layers.append((ref(module), ref(self)))

    def end(self) -> None:
        """End it: no more is recorded."""
        self.over = True
        for row in self.rows_here:
            self.report.guard(row.name, row.stack)

    # Hooks. Torch may call one that was removed meanwhile, and then without kwargs

    def begin_call(self, name: str, module: nn.Module, _args: Any = ()) -> None:
        """Begin a call of a layer, before all other hooks."""
        if self._rests(module):
            return
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        if module in self.layers:
            self.calls[module] = Call(name, number)
        else:  # a shallow copy has the same hooks
            self.report.skip(name, "it runs in nn.DataParallel" if is_replica(module) else "a copy of it runs")

    def see_input(self, module: nn.Module, args: Any = (), kwargs: Any = None) -> None:
        """Look at the input of a layer, after all other hooks, unless its VCL came before."""
        self._see(module, *([first_input(args, kwargs or {})] if args or kwargs else []))

    def see_output(self, module: nn.Module, _args: Any, y: Any) -> None:
        """Look at the output of a layer that has VCL of it."""
        self._see(module, y)

    def before_vcl(self, vcl: Any, args: Any = (), kwargs: Any = None) -> None:
        """Look at the input of a layer's VCL."""
        module = None if self._rests(vcl) else self.layer_of.get(vcl)
        call = None if module is None else self.calls.get(module)
        if module is None or call is None or call.vcl is not None or not (args or kwargs):
            return
        x = first_input(args, kwargs or {})
        self._see(module, x)
        if call.row is not None and vcl.training:
            self.report.guard(call.name, partial(self._begin_vcl, vcl, call, call.row, x))

    def after_vcl(self, vcl: Any, _args: Any = (), _y: Any = None) -> None:
        """Look at the loss of a layer's VCL."""
        module = None if self._rests(vcl) else self.layer_of.get(vcl)
        call = None if module is None else self.calls.get(module)
        if call is not None and call.row is not None and call.vcl is vcl:
            self.report.guard(call.name, partial(self._end_vcl, call.vcl, call, call.row))

    def _rests(self, module: nn.Module) -> bool:
        """Whether nothing is to be recorded: under a compiler, in a copy, in a checkpoint's recomputation."""
        if torch.compiler.is_compiling():
            return True
        if self.over:  # a copy, or two threads
            remove_hooks(module, self)
        return self.over or in_backward()

    # What they record

    def _see(self, module: nn.Module, *inputs: Any) -> None:
        call = None if self._rests(module) else self.calls.get(module)
        if call is not None and not call.seen:
            call.seen = True
            self.report.guard(call.name, partial(self._record, module, call, *inputs))

    def _record(self, module: nn.Module, call: Call, *inputs: Any) -> str | None:
        reason = why_not(inputs[0]) if inputs else "it is called without arguments"
        if reason is not None:
            return reason
        vcls, settings = vcls_of(module), self.settings
        vcl = vcls[min(call.number, len(vcls) - 1)] if vcls else None
        view = channels_first(inputs[0], settings.channel_dim or (vcl.channel_dim if vcl else 1))
        n = settings.sub_batch_size or (vcl.sub_batch_size if vcl else 5)
        found = of_input(view, n, settings.unit or (vcl.unit if vcl else "channel"))
        call.row = Row(self.step, call.name, call.number, found)
        self.rows_here.append(call.row)
        self.rows.waiting.append(call.row)
        return None

    def _begin_vcl(self, vcl: VCLActivation, call: Call, row: Row, x: Tensor) -> None:
        call.vcl, call.loss_before = vcl, vcl.latest.loss if vcl.sums_calls else None
        beta = acting_beta(vcl, x, row.values["kurtosis"])
        row.values |= of_vcl(vcl, beta, channels_first(x, vcl.channel_dim))
        if x.requires_grad and torch.is_grad_enabled() and (beta is not None or vcl.form == "variance"):
            call.share = Share(x, vcl, beta, row)
            handle = x.register_hook(self._in_backward(row, call.share.arrive))
            if x.is_leaf:
                call.share.on_leaf = handle
                self.hooks.of_leaves.append(handle)

    def _end_vcl(self, vcl: VCLActivation, call: Call, row: Row) -> None:
        loss = vcl.latest.loss
        if loss is None:
            return
        own = loss.detach() if call.loss_before is None else loss.detach() - call.loss_before.detach()
        row.values["loss"] = own.to(row.values["kurtosis"])
        if call.share is not None and loss.requires_grad:
            loss.register_hook(self._in_backward(row, call.share.note_upstream))

    def _in_backward(self, row: Row, do: Callable[[Tensor], str | None]) -> Callable[[Tensor], None]:
        """Return a hook of a tensor. No garbage collector sees it: what it holds must not hold the model."""
        return partial(self.report.in_backward, row.name, do)

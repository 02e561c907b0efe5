"""The hooks of a monitor: they count training forwards, and record every call of a layer in some of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..checks import channels_first
from ..torch_private import in_backward, is_replica, may_be_compiled, runs_inside_itself, without_modes
from .fused import first_input
from .layers import is_behind, layers_of, vcls_of
from .modules import VCLActivation
from .rows import Row, Rows
from .share import Share
from .statistics import acting_beta, of_input, of_vcl, why_not
from .undo import Hooks, uncompiled

__all__ = ["Recorder", "Settings", "tell_compiled"]


class Settings(NamedTuple):
    """What a monitor was asked for."""

    every: int
    sub_batch_size: int | None
    unit: str
    channel_dim: int | None


class Recorder:
    """Records what the layers of one model get. A copy of the model has a copy of it that does nothing.

    Args:
        model: without what wraps it.
        settings: what was asked for.
        rows: get what is recorded.
        hooks: get what is to be taken back.

    Attributes:
        skipped: why a layer, or a call of it, has no statistics.

    Raises:
        ValueError: the model has no layer.
    """

    number = 0  # of no recorder: a copy
    numbers = itertools.count(1)

    def __init__(self, model: nn.Module, settings: Settings, rows: Rows, hooks: Hooks) -> None:
        self.model, self.layers = model, layers_of(model)
        self.settings, self.rows, self.hooks = settings, rows, hooks
        self.skipped: dict[str, str] = {}
        self.number = next(self.numbers)
        _recorders[self.number] = self
        # Of the forward that runs
        self.nested = 0  # forwards of the model inside of it
        self.began: list[Row] = []
        self.calls: dict[str, int] = {}  # of a layer so far
        self.row_of: dict[VCLActivation, Row] = {}  # the row of a layer's call, whose VCL comes next
        self.acting: dict[VCLActivation, Acting] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copy one that does nothing."""
        return {"hooks": self.hooks, "skipped": self.skipped, "began": []}

    # Hooks of the model. Where a compiler traces them, it sees their first lines alone

    def before_forward(self, model: nn.Module, _args: tuple[Any, ...]) -> None:
        """Count a training forward, and look at it if it is its turn."""
        if torch.compiler.is_compiling():
            if model.training:
                _tell_compiled(self.number)
            return
        if self._rests():
            return
        hooks = self.hooks
        if hooks.inside:
            if runs_inside_itself(model):
                self.nested += 1
                return
            self.end()  # of a forward that an interrupt left
        if self.model.training:
            hooks.inside, self.nested = True, 0
            looks = hooks.forwards % self.settings.every == 0
            hooks.forwards += 1
            if looks:
                self._guard(type(self.model).__name__, self._look)

    def after_forward(self, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """End what :meth:`before_forward` began."""
        if self._rests():
            return
        if self.nested:
            self.nested -= 1
        elif self.hooks.inside:
            if self.hooks.of_layers and not self.calls and output is not None:  # None: also of an error
                self._skip(type(self.model).__name__, "its forward calls none of its layers (in a CUDA graph?)")
            self.end()

    def _rests(self) -> bool:
        """Whether nothing is to be recorded: under a compiler, in a copy, in a checkpoint's recomputation."""
        return torch.compiler.is_compiling() or self.number == 0 or in_backward()

    def end(self) -> None:
        """End a forward, or what an interrupt left of it."""
        self.hooks.end()
        began, self.began, self.calls, self.row_of, self.acting = self.began, [], {}, {}, {}
        for row in began:
            self._guard(row.layer, row.pack)

    def _look(self) -> str | None:
        if torch.jit.is_tracing():
            return "torch.jit traces it"
        self.rows.note_rank()
        hooks = self.hooks
        if may_be_compiled():
            uncompiled.enter()
            hooks.uncompiled = True
        vcls: dict[VCLActivation, None] = {}
        for name, module in self.layers:  # before all other hooks, which may change the input
            if is_behind(module):
                see: Callable[..., Any] = partial(self._see_output, name)
                hooks.of_layers.append(module.register_forward_hook(see, prepend=True))
            else:
                see = partial(self._see_input, name)
                hooks.of_layers.append(module.register_forward_pre_hook(see, prepend=True, with_kwargs=True))
            vcls |= dict.fromkeys(vcls_of(module))
        for vcl in vcls:
            hooks.of_layers.append(vcl.register_forward_pre_hook(self._before_vcl, with_kwargs=True))
            hooks.of_layers.append(vcl.register_forward_hook(self._after_vcl))
        return None

    # Hooks of layers

    def _see_input(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(name, module, *([first_input(args, kwargs)] if args or kwargs else []))

    def _see_output(self, name: str, module: nn.Module, _args: tuple[Any, ...], y: Any) -> None:
        self._see(name, module, y)

    def _see(self, name: str, module: nn.Module, *inputs: Any) -> None:
        if not self._rests():
            call = self.calls[name] = self.calls.get(name, -1) + 1
            label = f"{name}:{call}" if call else name
            self._guard(label, partial(self._record, label, call, module, *inputs))

    def _record(self, label: str, call: int, module: nn.Module, *inputs: Any) -> str | None:
        if is_replica(module):
            return "it runs in nn.DataParallel"
        reason = why_not(inputs[0]) if inputs else "it is called without arguments"
        if reason is not None:
            return reason
        vcls, settings = vcls_of(module), self.settings
        vcl = vcls[min(call, len(vcls) - 1)] if vcls else None
        view = channels_first(inputs[0], settings.channel_dim or (vcl.channel_dim if vcl else 1))
        row = Row(self.hooks.forwards - 1, label)
        row.values |= of_input(view, settings.sub_batch_size or (vcl.sub_batch_size if vcl else 5), settings.unit)
        self.rows.waiting.append(row)
        self.began.append(row)
        if vcl is not None:
            self.row_of[vcl] = row
        return None

    def _before_vcl(self, vcl: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        row = None if self._rests() else self.row_of.pop(vcl, None)
        if row is not None and vcl.training:
            self._guard(row.layer, partial(self._begin_vcl, vcl, row, args, kwargs))

    def _begin_vcl(self, vcl: VCLActivation, row: Row, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        acting = self.acting[vcl] = Acting(row, vcl.latest.loss if vcl.sums_calls else None)
        beta = acting_beta(vcl, x, row.values["kurtosis"])
        row.values |= of_vcl(vcl, beta, channels_first(x, vcl.channel_dim))
        if x.requires_grad and torch.is_grad_enabled() and (beta is not None or vcl.form == "variance"):
            acting.share = Share(x, vcl, beta, partial(row.set, "share"))
            x.register_hook(partial(self._in_backward, row.layer, acting.share.arrive))

    def _after_vcl(self, vcl: Any, _args: tuple[Any, ...], _y: Any) -> None:
        acting = None if self._rests() else self.acting.pop(vcl, None)
        if acting is not None:
            self._guard(acting.row.layer, partial(self._end_vcl, vcl, acting))

    def _end_vcl(self, vcl: VCLActivation, acting: Acting) -> None:
        loss = vcl.latest.loss
        if loss is None:
            return
        own = loss.detach() if acting.sum_before is None else loss.detach() - acting.sum_before.detach()
        acting.row.set("loss", own.to(acting.row.values["kurtosis"]))
        if acting.share is not None and loss.requires_grad:
            loss.register_hook(partial(self._in_backward, acting.row.layer, acting.share.note_upstream))

    def _in_backward(self, layer: str, note: Callable[[Tensor], None], g: Tensor | None) -> None:
        if g is not None:  # of an output that was not used
            self._guard(layer, partial(note, g))

    # What cannot be recorded

    def _guard(self, layer: str, do: Callable[[], str | None]) -> None:
        """Do it, or note why not: what it returns, or raises. Training goes on whatever happens here."""
        try:
            with without_modes():
                reason = do()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self._skip(layer, reason)

    def _skip(self, layer: str, reason: str) -> None:
        if layer not in self.skipped:
            self.skipped[layer] = reason
            self.hooks.said.discard("skipped")
            self.hooks.tell(
                "skipped",
                f"VCLMonitor cannot look at layer {layer!r}: {reason}. It goes on without it. monitor.skipped has all "
                "that was left out",
            )


class Acting:
    """A call of a VCL that runs."""

    def __init__(self, row: Row, sum_before: Tensor | None) -> None:
        self.row, self.sum_before = row, sum_before  # the loss of earlier calls, where they are summed
        self.share: Share | None = None


_recorders: WeakValueDictionary[int, Recorder] = WeakValueDictionary()


def tell_compiled(hooks: Hooks) -> None:
    """Say that nothing is recorded of a model that is compiled, hooks and all."""
    hooks.tell(
        "compiled",
        "VCLMonitor records nothing of a model that is compiled together with its hooks. Give it what torch.compile "
        "returned, and in place of model.compile() call torch.compile(model)",
    )


def _tell(number: int) -> bool:
    recorder = _recorders.get(number)
    if recorder is not None:
        tell_compiled(recorder.hooks)
    return True


# A compiler calls this while it traces: its graph has no trace of it, and it guards on nothing that it reads.
_tell_compiled: Any = getattr(torch.compiler, "assume_constant_result", lambda function: function)(_tell)

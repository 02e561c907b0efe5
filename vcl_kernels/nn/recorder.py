"""The hooks of a monitor on its model: they count training forwards, and look at some of them."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import nn

from ..torch_private import (
    in_backward,
    is_running,
    may_be_compiled,
    remove_hooks,
    runs_inside_itself,
    while_tracing,
)
from .layers import Layers, is_behind
from .look import Look, Settings
from .report import Report
from .rows import Row, Rows
from .undo import Hooks, uncompiled

__all__ = ["Recorder", "tell_compiled"]


class Recorder:
    """Counts the forwards of one model. A copy of the model has a copy of it that does nothing.

    Args:
        model: without what wraps it.
        settings: what was asked for.
        rows: get what is recorded.
        report: gets why something is not.
        hooks: get what is to be taken back.

    Raises:
        ValueError: the model has no layer.
    """

    number = 0  # of no recorder: a copy
    numbers = itertools.count(1)
    inside: nn.Module | None = None  # whose forward in training runs, or was left by an interrupt
    nested = 0  # forwards of it inside of that
    look: Look | None = None  # at that

    def __init__(self, model: nn.Module, settings: Settings, rows: Rows, report: Report, hooks: Hooks) -> None:
        self.model, self.layers, self.settings = model, Layers(model), settings
        self.rows, self.report, self.hooks = rows, report, hooks
        self.number = next(self.numbers)
        _recorders[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        """Copy one that does nothing."""
        return {"hooks": self.hooks, "report": self.report}

    def watch(self, outer: nn.Module) -> None:
        """Hook the model, or what wraps it."""
        itself = outer in self.layers.find()  # a layer
        self.hooks.of_model.append((ref(outer), ref(self)))
        outer.register_forward_pre_hook(self.before_forward, prepend=itself)
        if itself:
            outer.register_forward_pre_hook(self.before_own_call, with_kwargs=True)
        outer.register_forward_hook(self.after_forward, always_call=True)

    # Hooks. Where a compiler traces them, it sees their first lines alone

    def before_forward(self, model: nn.Module, _args: Any = ()) -> None:
        """Count a training forward, and look at it if it is its turn."""
        if torch.compiler.is_compiling():
            if model.training:
                _tell_compiled(self.number)
            return
        try:
            self._begin(model)
        except Exception as error:
            self.report.skip(type(model).__name__, f"{type(error).__name__}: {error}")

    def before_own_call(self, model: nn.Module, args: Any = (), kwargs: Any = None) -> None:
        """See the input of a model that is a layer itself."""
        if not torch.compiler.is_compiling() and self.look is not None and model in self.look.layers:
            if not is_behind(model):
                self.look.see_input(model, args, kwargs)
            if model in self.look.layer_of:
                self.look.before_vcl(model, args, kwargs)

    def after_forward(self, model: nn.Module, _args: Any, output: Any) -> None:
        """End what :meth:`before_forward` began."""
        if torch.compiler.is_compiling():
            return
        try:
            self._after(model, output)
        except Exception as error:
            self.report.skip(type(model).__name__, f"{type(error).__name__}: {error}")

    def _begin(self, model: nn.Module) -> None:
        if self.number == 0:
            remove_hooks(model, self)
            return
        if in_backward():  # a checkpoint's recomputation
            return
        if self.inside is not None:
            if runs_inside_itself(model):
                self.nested += 1
                return
            self.end()  # of a forward that an interrupt left
        if not self.model.training:
            return
        if torch.jit.is_tracing():
            self.report.skip(type(self.model).__name__, "torch.jit traces it")
            return
        self.inside, self.nested = model, 0
        step = self.report.forwards
        self.report.forwards += 1
        if step % self.settings.every == 0:
            self.report.guard(type(self.model).__name__, lambda: self._look(model, step))

    def _look(self, outer: nn.Module, step: int) -> str | None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is captured, which would hold what is recorded and never run it anew"
        self.rows.note_rank()
        self.hooks.release_leaves()
        if may_be_compiled():
            uncompiled.enter(self.hooks)
        self.look = Look(step, self.settings, self.rows, self.report, self.hooks)
        self.look.begin(self.layers.find(), outer)
        if outer in self.look.layers:
            self.look.begin_call(self.look.layers[outer], outer)
        return None

    def _after(self, model: nn.Module, output: Any) -> None:
        if self.number == 0 or in_backward():
            return
        if self.nested:
            self.nested -= 1
        elif self.inside is not None:
            if self.look is not None:
                self._finish(self.look, model, output)
            self.end()

    def _finish(self, look: Look, model: nn.Module, output: Any) -> None:
        if model in look.layers:
            if is_behind(model):
                look.see_output(model, (), output)
            if model in look.layer_of:
                look.after_vcl(model)
        elif not look.counts and output is not None:  # None: also of an error
            look.report.skip(
                type(self.model).__name__,
                "its forward calls none of its layers. Likely causes: it replays a CUDA graph, it calls functions or "
                "compiled parts in place of its modules, or the layers run in another process",
            )

    def end(self) -> None:
        """End a forward, or what an interrupt left of it."""
        self.hooks.end()
        if self.look is not None:
            self.look.end()
        self.inside = self.look = None

    def end_what_was_left(self) -> None:
        """End what an interrupt left of a forward. One that runs goes on: a hook or the model itself may flush."""
        if self.inside is not None and not is_running(self.inside):
            self.end()

    def unfinished(self) -> list[Row]:
        """Return the rows of the forward that runs."""
        return [] if self.look is None else self.look.rows_here


_recorders: WeakValueDictionary[int, Recorder] = WeakValueDictionary()


def tell_compiled(report: Report) -> None:
    """Say that nothing is recorded of a model that is compiled, hooks and all."""
    report.tell(
        "compiled",
        "VCLMonitor records nothing of a model that is compiled together with its hooks. Give it what torch.compile "
        "returned, and in place of model.compile() call torch.compile(model)",
    )


def _tell(number: int) -> bool:
    recorder = _recorders.get(number)
    if recorder is not None:
        tell_compiled(recorder.report)
    return True


_tell_compiled = while_tracing(_tell)

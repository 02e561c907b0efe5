"""What a trainer does with VCL in each step, whichever library it is from: attach, the weight, what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_choice, check_count
from ..nn.attach import attach
from ..nn.glance import Glance
from ..nn.handle import VCLHandle, handles_in
from ..nn.parameters import betas_of
from ..nn.rows import STATISTICS
from ..torch_private import map_tensors
from .schedule import Decay, check_schedule, weight_at

__all__ = ["Driver", "load_betas"]

_made: WeakSet[VCLHandle] = WeakSet()  # by any driver, and not removed yet
OF_ATTACH = set(signature(attach).parameters) - {"model", "example_input", "weight"}


class Driver:
    """Attaches VCL with ``inject=True``, sets its weight before each step, and measures what is logged.

    Args:
        given: a handle that exists. None: that of the model, or else the model is attached.
        weight: the largest. None: that of a handle that exists, or 0.01.
        warmup_steps, decay: as for :func:`weight_at`.
        log: statistics of each layer, named as the columns of :class:`vcl_kernels.VCLMonitor`.
        log_every_n_steps: optimizer steps from one measurement to the next; None: the trainer's own.
        settings: of :func:`vcl_kernels.attach`.

    Attributes:
        handle: that of the model, while it is attached.
        made: whether it was made here.
    """

    def __init__(
        self,
        given: VCLHandle | None,
        *,
        weight: float | None = None,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        log: Sequence[str] = (),
        log_every_n_steps: int | None = None,
        **settings: Any,
    ) -> None:
        check_schedule(0.01 if weight is None else weight, warmup_steps, decay)
        if isinstance(log, str) or not isinstance(log, Sequence):
            raise TypeError(f"log must be a sequence of statistics, such as ('loss', 'variance'); got {log!r}")
        for name in log:
            check_choice("log", name, STATISTICS)
        if log_every_n_steps is not None:
            check_count("log_every_n_steps", log_every_n_steps, 1)
        if given is not None and not isinstance(given, VCLHandle):
            raise TypeError(f"handle must be what vcl_kernels.attach returned; got a {type(given).__name__}")
        unknown = [name for name in settings if name not in OF_ATTACH]
        if unknown:
            known = ", ".join(sorted(OF_ATTACH))
            raise TypeError(f"unknown settings {', '.join(unknown)}; those of attach are {known}")
        if not settings.get("inject", True):
            raise ValueError("inject=False is for a loss that your own code adds: attach yourself, and give the handle")
        if given is not None and settings:
            raise TypeError(f"settings of attach are for a model without a handle; got {', '.join(settings)}")
        self.given, self.handle, self.made = given, given, False
        self.model: nn.Module | None = None  # that is trained, from attach to detach
        self.weight, self.warmup_steps, self.decay = weight, warmup_steps, decay
        self.largest = 0.0  # of the handle's weight, during the training
        self._set_back: Callable[[], None] | None = None  # the handle's weight, accumulation and scaler
        self.log, self.log_every_n_steps, self.settings = tuple(log), log_every_n_steps, settings
        self._glance = Glance()
        self._measured = -1  # the latest step that was

    def finds(self, model: nn.Module) -> VCLHandle | None:
        """Return the handle that was given, or the one that the model or a part of it has.

        Raises:
            ValueError: the handle is of another model, or was removed; the model has several; it has one, and there
                are settings for another.
        """
        handles = handles_in(model)
        name = type(model).__name__
        if self.given is not None:
            if self.given not in handles:
                raise ValueError(
                    f"handle must be of the model that is trained or a part of it ({name}); it was removed, or is of "
                    f"another model ({type(self.given.model).__name__})"
                )
            return self.given
        if len(handles) > 1:
            raise ValueError(
                f"{len(handles)} parts of the model ({name}) have VCL attached, each with a handle of its own. Give "
                "each of them, with handle="
            )
        found = handles[0] if handles else None
        if found is not None and (self.settings or found in _made):
            why = "by another trainer or callback" if found in _made else f"without {', '.join(self.settings)}"
            raise ValueError(
                f"the model ({name}) has VCL attached already, {why}. Call vcl_kernels.handle_of(model).remove() first"
            )
        return found

    def attach(self, model: nn.Module, example_input: Any) -> VCLHandle:
        """Return the handle that the model has, or attach VCL to the model.

        The example goes to the model's device; float32 becomes the model's dtype.
        """
        handle = self.finds(model)
        made = handle is None
        if handle is None:
            settings = {"inject": True, **self.settings}
            if settings.get("beta_mode") in (None, "fixed"):  # a step may call a layer any number of times
                settings = {"shared_beta": True, **settings}
            handle = attach(model, _moved(example_input, model), **settings)
            _made.add(handle)
        self.model, self.handle, self.made, self._measured = model, handle, made, -1
        self._set_back = handle.remember()
        self.largest = handle.weight = handle.weight if self.weight is None else self.weight
        return handle

    def begin(self, step: int, *, total_steps: float | None = None, measure: bool = False) -> None:
        """Begin a forward and backward of optimizer step ``step``; with ``measure``, the first one is measured."""
        assert self.handle is not None
        if self.warmup_steps or self.decay != "constant":
            schedule: dict[str, Any] = {"warmup_steps": self.warmup_steps, "decay": self.decay}
            self.handle.weight = weight_at(step, self.largest, total_steps=total_steps, **schedule)
        if measure and step != self._measured:
            self._measured = step
            self._glance.begin(self.handle)

    def is_due(self, step: int, every: int) -> bool:
        """Whether ``step`` is the last of each ``log_every_n_steps``, or ``every`` where that is None."""
        return (step + 1) % (self.log_every_n_steps or every) == 0

    def end(self, place: str = "") -> dict[str, float]:
        """End the step. Return what is to be logged, if it was measured; ``place`` comes before layers' names."""
        rows = self._glance.end()
        if not rows or self.handle is None:
            return {}
        losses = {row["layer"]: row["loss"] for row in rows if not math.isnan(row["loss"])}
        # Layers under reentrant checkpointing have their loss in the backward pass, when nothing is measured
        found = {name.partition(":")[0] for name in losses}
        late = {name: loss for name, loss in self.handle.losses.items() if name.partition(":")[0] not in found}
        if late:
            values = torch.stack([loss.to("cpu", torch.float64) for loss in late.values()]).tolist()
            losses |= dict(zip(late, values, strict=True))
        metrics = {"vcl_loss": math.fsum(losses.values())}
        for name in self.log:
            of = losses if name == "loss" else {row["layer"]: row[name] for row in rows}
            metrics |= {f"vcl_{name}/{place}{layer}": value for layer, value in of.items() if not math.isnan(value)}
        return metrics

    def cancel(self) -> None:
        """End a step that failed or was left out."""
        self._glance.cancel()

    def detach(self) -> None:
        """End the training: a handle that was made here is removed, another one is as it was."""
        self.cancel()
        handle = self.handle
        if self.model is not None and handle is not None:
            if self._set_back is not None:
                self._set_back()
            if self.made:
                _made.discard(handle)
                handle.remove()
        self.handle, self.model, self.made, self._set_back = self.given, None, False, None


def load_betas(model: nn.Module, betas: dict[str, Tensor], argument: str) -> None:
    """Load the betas of a checkpoint into the VCL of ``model``.

    Raises:
        ValueError: they are not those of its layers; the settings are those of ``argument``.
    """
    shapes = {name: None if is_lazy(beta) else beta.shape for name, beta in betas_of(model).items()}
    other = sorted(betas.keys() ^ shapes.keys())
    other += [name for name, beta in betas.items() if shapes.get(name) not in (None, beta.shape)]
    if other:
        few = ", ".join(other[:3])
        raise ValueError(
            f"the checkpoint has {len(betas)} betas and the model {len(shapes)}; they differ in {few}. Give "
            f"{argument} the settings with which it was made (beta_mode, beta_init, unit, layers …)"
        )
    model.load_state_dict(betas, strict=False)


def _moved(example: Any, model: nn.Module) -> Any:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))

    def moved(x: Tensor) -> Tensor:
        return x.to(like.device, like.dtype if x.dtype == torch.float32 else x.dtype)

    return map_tensors(moved, example)

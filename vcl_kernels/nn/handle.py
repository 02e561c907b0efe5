"""The handle of an attached model: its losses, what can be set during training, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_count, check_number
from ..torch_private import in_backward, is_replica, map_tensors, runs_inside_itself
from .fused import Calls
from .modules import VCLActivation
from .steering import Steering
from .table import Row, summary, table
from .watch import Watch, follow, unfollow

__all__ = ["VCLHandle", "handle_of", "handles_in"]


class VCLHandle:
    """What :func:`attach` returns: losses, settings that may change during training, and the way back.

    ``print(handle)`` shows a table of the layers, of what was left out and why.

    Attributes:
        model: the attached model.
        layers: each layer's VCL by the module's name, ``name:1`` for its second call. ``layers[name].weight`` is a
            factor of that layer's own, 1 at first.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: dict[str, Calls],
        steering: Steering,
        rows: list[Row],
        undo: list[Callable[[], Any]],
    ) -> None:
        self.model = model
        self.layers: dict[str, VCLActivation] = {vcl.place: vcl for each in calls.values() for vcl in each}  # type: ignore[misc]
        self._calls, self._steering, self._rows, self._watch = calls, steering, rows, Watch()
        model.vcl_handle = self  # type: ignore[assignment]  # a copy of the model has the copied handle
        before = model.register_forward_pre_hook(self._before_forward)
        after = model.register_forward_hook(self._after_forward, always_call=True)
        # What remove() calls. All of it can be copied and pickled.
        self._undo: list[Callable[[], Any]] = [
            *undo,
            before.remove,
            after.remove,
        ]
        follow(self)

    def _before_forward(self, model: nn.Module, _args: tuple[Any, ...]) -> None:
        steering, watch = self._steering, self._watch
        if is_replica(model):
            raise RuntimeError(
                "a model with VCL attached cannot run in nn.DataParallel: the losses of its replicas would be lost. "
                "Use DistributedDataParallel"
            )
        if steering.in_forward and runs_inside_itself(model):
            steering.nested += 1
            return
        training = model.training or any(calls.training for calls in self._calls.values())
        recomputes = in_backward()  # a checkpoint of the whole model computes it anew
        if not recomputes:
            watch.forward(training, steering)
        keeps = steering.paused and not steering.was_read  # the forward before, to be read yet
        steering.begin(training, recomputes)
        if not keeps:
            for calls in self._calls.values():
                calls.begin()

    def _after_forward(self, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        steering = self._steering
        if steering.nested:
            steering.nested -= 1
            return None
        steering.in_forward = False
        if steering.trains and torch.distributed.is_available() and torch.distributed.is_initialized():
            return _with_betas(output, self._idle_betas())
        return None

    def _idle_betas(self) -> list[nn.Parameter]:
        """Return the betas that get no gradient from the present forward: DistributedDataParallel waits for all."""
        idle = [v.beta for v in self.layers.values() if self._steering.pauses or v.latest.loss is None]
        return [beta for beta in idle if isinstance(beta, nn.Parameter) and beta.requires_grad and not is_lazy(beta)]

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Note a step of any optimizer: one of this model is to move betas. PyTorch calls it."""
        of_model = self._watch.step(optimizer, self, self._steering, self._ran)
        if of_model and self._steering.inject:  # nobody reads the loss: else calls of parts would add up over steps
            self._end_reading()
            self._steering.was_read = True

    def __repr__(self) -> str:
        """Name the layers."""
        return f"VCLHandle({', '.join(self._calls)})"

    def __str__(self) -> str:
        """Return a table of the layers, and one line that sums it up."""
        return f"{table(self._rows, self.layers)}\n{summary(self._rows)}"

    def loss(self) -> Tensor:
        """Return :attr:`weight` times the sum over layers of the latest training forward's losses.

        It is 0 after an evaluation forward, so that one criterion serves training and validation, and where VCL was
        :meth:`paused`. If you call a submodule directly (``model.encoder(x)``), its loss counts too, until the loss is
        read. With ``inject`` the loss is in the graph already: this value is detached, for logs.

        Raises:
            RuntimeError: the model is in training and did not run yet, or its latest training forward ran without grad
                mode, so that the loss has no gradient; the handle was removed.
        """
        if not self._undo:
            raise RuntimeError("this handle was removed; call vcl_kernels.attach again")
        steering = self._steering
        ran = [vcl.latest for vcl in self._ran() if vcl.training or not steering.was_read]
        self._end_reading()
        self._watch.reading(len(ran) > 0, self.model, steering)
        if not ran:
            return torch.zeros((), device=next((p.device for p in self.model.parameters()), None))
        if torch.is_grad_enabled() and not any(latest.in_grad_mode for latest in ran):
            raise RuntimeError(
                "handle.loss() has no gradient: the latest training forward ran without grad mode, under "
                "torch.no_grad() or reentrant checkpointing. Run a forward under no_grad in evaluation or in "
                "handle.paused(), or read the loss before it; handle.losses has values without gradients. For "
                "checkpointing, use use_reentrant=False or attach(..., inject=True)"
            )
        losses: list[Any] = [latest.loss for latest in ran]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def _end_reading(self) -> None:
        """Make the losses old: the next call of a layer begins anew."""
        for vcl in self.layers.values():
            if vcl.latest.read and not self._steering.was_read:  # and other parts ran since
                vcl.latest.loss = None
            vcl.latest.read = True

    def _ran(self) -> list[VCLActivation]:
        """Return the layers that ran since the loss was read, or, if none did, before that."""
        was_read = self._steering.was_read
        return [v for v in self.layers.values() if v.latest.loss is not None and (was_read or not v.latest.read)]

    @property
    def losses(self) -> dict[str, Tensor]:
        """Each layer's part of :meth:`loss` by name, detached: for logs. Nothing waits for the device until read."""
        return {vcl.place: vcl.latest.loss.detach() for vcl in self._ran()}  # type: ignore[union-attr]

    @property
    def weight(self) -> float:
        """Multiplies the sum over layers. It may be set before any forward: a schedule, a warm-up."""
        return self._steering.weight

    @weight.setter
    def weight(self, weight: float) -> None:
        check_number("weight", weight)
        self._steering.weight = weight

    @property
    def inject(self) -> bool:
        """Whether the loss enters the graph through the layers' outputs: then nobody adds :meth:`loss`."""
        return self._steering.inject

    @property
    def accumulation(self) -> int:
        """With ``inject``, the number k by which the objective is divided to add the gradients of k batches.

        What is injected is divided by it too. If the objective is not divided, leave it at 1.
        """
        return self._steering.accumulation

    @accumulation.setter
    def accumulation(self, accumulation: int) -> None:
        check_count("accumulation", accumulation, 1)
        if accumulation > 1 and not self._steering.inject:
            raise ValueError("accumulation is for inject=True; divide handle.loss() with the rest of the objective")
        self._steering.accumulation = accumulation

    def follow_accumulation(self, follows: Callable[[], int]) -> None:
        """Ask ``follows`` for :attr:`accumulation` at each forward, until that is set. Compiled code asks once, now."""
        if not self.inject:
            raise ValueError("accumulation is for inject=True; divide handle.loss() with the rest of the objective")
        self._steering.follow(follows)

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """With ``inject``, the GradScaler that scales the objective. Set None to say that there is none."""
        return self._steering.grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        self._steering.grad_scaler = scaler

    def remember(self) -> Callable[[], None]:
        """Return a function that sets weight, accumulation and scaler back to what they are now."""
        told = vars(self._steering)
        before = {n: told[n] for n in ("weight", "_accumulation", "follows", "_grad_scaler", "grad_scaler_told")}
        return partial(told.update, before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model without VCL, also in training: for a generator's step, a warm-up, one of two forwards.

        A loss that was computed before and is not read yet can still be read.

        >>> from vcl_kernels import attach
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
        >>> handle = attach(net, torch.randn(2, 4))
        >>> with handle.paused():
        ...     y = net(torch.randn(32, 4))
        >>> handle.losses
        {}
        """
        before, self._steering.paused = self._steering.paused, True
        try:
            yield
        finally:
            self._steering.paused = before

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the learned betas, which are among ``model.parameters()`` too."""
        seen = set()
        for vcl in self.layers.values():
            for beta in vcl.parameters():
                if beta not in seen:
                    seen.add(beta)
                    yield beta

    def remove(self) -> None:
        """Restore the model: no hooks, no betas, its own forwards, in place again where it was."""
        for undo in self._undo:
            undo()
        for module in self.model.modules():  # a wrapper may have passed the attribute on to what is in it
            if vars(module).get("vcl_handle") is self:
                del module.vcl_handle
        self._calls, self._undo, self.layers, self._rows = {}, [], {}, []
        unfollow(self)

    def __getstate__(self) -> dict[str, Any]:
        """Start a copy's watch anew."""
        return {**self.__dict__, "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _watch=Watch())
        follow(self)


def _with_betas(output: Any, betas: list[nn.Parameter]) -> Any:
    """Put ``betas`` into the graph of each tensor of ``output``, with gradients of 0."""

    def added(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() and tensor.requires_grad):
            return tensor
        sums = torch.stack([beta.sum().to(tensor.device, tensor.dtype) for beta in betas])
        return tensor + 0 * sums.sum()

    return map_tensors(added, output) if betas else None


def handle_of(model: nn.Module) -> VCLHandle:
    """Return the handle of an attached model, a copy of one, or a wrapper (DistributedDataParallel, torch.compile).

    Raises:
        ValueError: no module of ``model`` has VCL attached.

    >>> import copy
    >>> from vcl_kernels import attach
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    >>> handle = attach(net, torch.randn(2, 4))
    >>> handle_of(net) is handle, handle_of(copy.deepcopy(net)) is handle
    (True, False)
    """
    handles = handles_in(model)
    if not handles:
        raise ValueError(f"model ({type(model).__name__}) has no VCL attached; call vcl_kernels.attach(model, …) first")
    return handles[0]


def handles_in(model: nn.Module) -> list[VCLHandle]:
    """Return the handles of ``model`` and its parts, each once."""
    found = (getattr(module, "vcl_handle", None) for module in model.modules())
    return list(dict.fromkeys(handle for handle in found if isinstance(handle, VCLHandle)))

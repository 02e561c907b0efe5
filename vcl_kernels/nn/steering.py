"""What a handle sets and its modules read: one object for all VCLs of a model. A VCL of its own has its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..injection import Injection
from .warn import warn

__all__ = ["ENOUGH_FORWARDS", "Steering"]


ENOUGH_FORWARDS = 3  # an unread loss is told after so many training forwards


class Forwards:
    """Whether the forwards since the latest recomputation were paused: a checkpoint will run some of them again."""

    def __init__(self) -> None:
        self.paused: set[bool] = set()
        self.paused_without_grad: set[bool] = set()  # under torch.no_grad, or a reentrant checkpoint of the whole
        self.ran_again = False

    def note(self, paused: bool) -> None:
        """Note a forward in training that begins. A compiler recomputes by itself, and would guard on this."""
        if torch.compiler.is_compiling():
            return
        if self.ran_again:
            self.paused, self.paused_without_grad, self.ran_again = set(), set(), False
        (self.paused if torch.is_grad_enabled() else self.paused_without_grad).add(paused)

    def run_again(self) -> bool:
        """Note a recomputation that begins; return whether VCL was paused in its forward.

        Raises:
            RuntimeError: there were forwards of both kinds, and it could be of either.
        """
        kinds = self.paused or self.paused_without_grad
        if len(kinds) > 1:
            raise RuntimeError(
                "a checkpoint runs a forward again, and forwards ran with and without handle.paused() since the last "
                "backward: which of them it was is unknown. Call backward for each before the other runs, or run "
                "one whose gradient is not wanted under torch.no_grad()"
            )
        self.ran_again = True
        return True in kinds


class Steering:
    """Settings that may change at any time, and where the model's present forward stands."""

    def __init__(self, inject: bool, *, attached: bool = False, weight: float = 1.0) -> None:
        self.inject = inject
        self.attached = attached  # by attach: a plain checkpoint loads, and betas start anew
        self.first_weight = self.weight = weight  # multiplies that of each layer
        self._accumulation = 1  # an injected loss is divided by it
        self.follows: Callable[[], int] | None = None  # tells it, as another object knows it
        self.paused = False
        self.said: set[str] = set()  # kinds of warnings
        self._grad_scaler: torch.amp.GradScaler | None = None
        self.grad_scaler_told = False  # set by the user, to None too
        # The latest forward of the model, not of a part of it or a recomputation
        self.in_forward = False
        self.nested = 0  # forwards of the model inside of it
        self.trains = False  # in training and grad mode
        self.pauses = False
        self.began_in_grad_mode = True
        self.forwards = Forwards()
        # Whether the loss was read and nothing ran since. Parts that run alone between two readings belong together
        self.was_read = self.ever_read = self.ran_part = False
        self.lost = False  # by a part that ran again since, so that its loss was replaced

    @property
    def accumulation(self) -> int:
        """What an injected loss is divided by. Compiled code has that of the time when it was told."""
        if self.follows is not None and not torch.compiler.is_compiling():
            self._accumulation = self.follows()
        return self._accumulation

    @accumulation.setter
    def accumulation(self, accumulation: int) -> None:
        self._accumulation, self.follows = accumulation, None

    def follow(self, follows: Callable[[], int]) -> None:
        """Ask ``follows`` for the accumulation at each forward. A copy has that of the present."""
        self._accumulation, self.follows = follows(), follows

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler that scales the objective into which losses are injected."""
        return self._grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        self._grad_scaler, self.grad_scaler_told = scaler, True

    def injection(self) -> Injection:
        """Return how injected losses enter the graph."""
        return Injection(self._grad_scaler, self.accumulation)

    def begin(self, training: bool, recomputes: bool) -> None:
        """Begin a forward of the model, or a checkpoint's recomputation of it."""
        self.in_forward, self.nested = True, 0
        self.was_read = self.lost = False
        self.began_in_grad_mode = torch.is_grad_enabled()
        self.trains = training and self.began_in_grad_mode and not recomputes
        self.pauses = self.forwards.run_again() if recomputes else self.paused
        if training and not recomputes:
            self.forwards.note(self.paused)

    def begin_part(self) -> None:
        """Begin a call of a part of the model alone. The first since losses were read makes them old."""
        self.ran_part = True
        if self.was_read:
            self.was_read = self.lost = False

    def pauses_part(self) -> bool:
        """Note a call of a part of the model alone; return whether VCL is paused in it."""
        self.forwards.note(self.paused)
        return self.paused

    def lose(self, times: int) -> None:
        """Note that a part which runs alone replaces a loss that was not read, the ``times``-th in a row."""
        if self.inject:
            return
        self.lost = True
        if times >= ENOUGH_FORWARDS and not self.ever_read:
            self.warn_unread()

    def warn(self, kind: str, text: str) -> None:
        """Issue one warning of each kind."""
        warn(self.said, kind, text)

    def warn_unread(self) -> None:
        """Tell that nobody reads the loss."""
        self.warn(
            "unread",
            "the model ran several times in training, and handle.loss() was never read. Until its loss is in the "
            "objective, VCL has no effect. Add handle.loss() to the objective of each forward, or attach with "
            "inject=True",
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one step or one training loop: a copy can be made at any time."""
        new = Steering(self.inject)
        kept = ("attached", "first_weight", "weight")
        return {**new.__dict__, **{name: self.__dict__[name] for name in kept}, "_accumulation": self.accumulation}

"""What a handle sets and its modules read: one object for all VCLs of a model. A VCL of its own has its own."""

from __future__ import annotations

from typing import Any

import torch

from ..injection import Injection
from .warn import warn

__all__ = ["Steering"]


class Steering:
    """Settings that may change at any time, and where the model's present forward stands."""

    def __init__(self, inject: bool, *, attached: bool = False) -> None:
        self.inject = inject
        self.attached = attached  # by attach: a plain checkpoint loads, and betas start anew
        self.weight = 1.0  # multiplies that of each layer
        self.accumulation = 1  # an injected loss is divided by it
        self.paused = False
        self.said: set[str] = set()  # kinds of warnings
        self._grad_scaler: torch.amp.GradScaler | None = None
        self.grad_scaler_told = False  # set by the user, to None too
        # The latest forward of the model, not of a part of it or a recomputation
        self.in_forward = False
        self.was_paused = False
        self.began_in_grad_mode = True
        # Parts that run alone: losses of one period, from one reading of the loss to the next, belong together
        self.was_read = False
        self.period: object = None

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

    def begin(self) -> None:
        """Begin a forward of the model."""
        self.in_forward, self.was_paused, self.was_read = True, self.paused, False
        self.began_in_grad_mode = torch.is_grad_enabled()

    def period_of_part(self) -> object:
        """Begin a call of a part of the model alone. The first since losses were read makes them old."""
        if self.was_read:
            self.was_read, self.period = False, object()
        return self.period

    def warn(self, kind: str, text: str) -> None:
        """Issue one warning of each kind."""
        warn(self.said, kind, text)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one step or one training loop: a copy can be made at any time."""
        left_out = {"_grad_scaler": None, "grad_scaler_told": False, "in_forward": False, "period": None}
        return {**self.__dict__, **left_out}

"""What a monitor tells of itself: forwards so far, what was left out, and warnings. It keeps no module alive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..torch_private import without_modes
from .warn import VCLWarning, warn

__all__ = ["Report", "unseen_by_checkpoints"]


def unseen_by_checkpoints() -> AbstractContextManager[Any]:
    """A context in which a checkpoint does not count what is saved: with hooks that do nothing, in place of its own."""
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(t: Tensor) -> Tensor:
    return t


class Report:
    """What a monitor tells.

    Attributes:
        forwards: in training, so far.
        skipped: why a layer has no statistics, or lacks those of some calls.
        said: kinds of warnings.
        untold: warnings that a filter made an error: a forward and a backward must not raise it.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.skipped: dict[str, str] = {}
        self.said: set[str] = set()
        self.untold: list[VCLWarning] = []

    @property
    def saw_nothing(self) -> bool:
        """Whether there was no training forward, and nothing was said of it."""
        return self.forwards == 0 and not self.said

    def guard(self, layer: str, do: Callable[[], str | None]) -> None:
        """Do it, or note why not: what it returns, or raises. Training goes on whatever happens here."""
        grad_mode = torch.is_grad_enabled()
        try:
            with without_modes():
                reason = do()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        except BaseException:
            torch.set_grad_enabled(grad_mode)  # an interrupt inside of no_grad's own code leaves it off
            raise
        if reason is not None:
            self.skip(layer, reason)

    def in_backward(self, layer: str, do: Callable[[Tensor], str | None], g: Tensor | None) -> None:
        """Do it with a gradient. None: that of an output that was not used."""
        if g is not None:
            self.guard(layer, lambda: do(g))

    def skip(self, layer: str, reason: str) -> None:
        """Note why a layer is left out, and warn once of each layer."""
        if layer not in self.skipped:
            self.skipped[layer] = reason
            self.said.discard("skipped")
            self.tell(
                "skipped",
                f"VCLMonitor cannot look at layer {layer!r}: {reason}. It goes on without it. monitor.skipped has all "
                "that was left out",
            )

    def tell(self, kind: str, text: str) -> None:
        """Issue one warning of each kind."""
        try:
            warn(self.said, kind, text)
        except VCLWarning as error:
            self.untold.append(error)

    def raise_untold(self) -> None:
        """Raise the first warning that a filter made an error."""
        untold, self.untold = self.untold, []
        if untold:
            raise untold[0]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is still to be raised."""
        return {**self.__dict__, "untold": []}

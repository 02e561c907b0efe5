"""What a monitor changes outside of itself: hooks, and whether compiled code runs."""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .warn import warn

__all__ = ["Hooks", "uncompiled"]


class Uncompiled:
    """Compiled code runs uncompiled while any monitor looks; they may end in another order than they began."""

    def __init__(self) -> None:
        self.looking, self.lock = 0, Lock()
        self.stance: Any = None

    def enter(self) -> None:
        """Begin to look."""
        with self.lock:
            if self.looking == 0:
                self.stance = torch.compiler.set_stance("force_eager")
            self.looking += 1

    def leave(self) -> None:
        """End it; after the last, compiled code runs as before."""
        with self.lock:
            self.looking -= 1
            if self.looking == 0:
                self.stance.__exit__(None, None, None)


uncompiled = Uncompiled()


class Hooks:
    """What a monitor has changed outside of itself, and takes back. It refers to no module."""

    def __init__(self) -> None:
        self.of_model: list[RemovableHandle] = []
        self.of_layers: list[RemovableHandle] = []
        self.uncompiled = False
        self.inside = False  # a forward of the model in training
        self.forwards = 0  # so far
        self.said: set[str] = set()  # kinds of warnings

    def __getstate__(self) -> dict[str, Any]:
        """Copy the counts alone."""
        return {**Hooks().__dict__, "forwards": self.forwards, "said": self.said}

    def end(self) -> None:
        """End a forward: no layer has a hook, and compiled code runs again."""
        self.inside = False
        while self.of_layers:
            self.of_layers.pop().remove()
        if self.uncompiled:
            self.uncompiled = False
            uncompiled.leave()

    def remove(self) -> None:
        """Remove all."""
        self.end()
        while self.of_model:
            self.of_model.pop().remove()

    def tell(self, kind: str, text: str) -> None:
        """Issue one warning of each kind."""
        warn(self.said, kind, text)

"""What a monitor changes outside of itself, and how it takes that back: hooks, and whether compiled code runs.

An interrupt may come anywhere. So each change is noted before it is made, and forgotten after it was taken back; to
take one back twice, or before it was made, does nothing.
"""

from __future__ import annotations

from contextlib import suppress
from threading import RLock
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..torch_private import Stance, compiler_stance, remove_hooks

__all__ = ["Hooks", "uncompiled"]

Noted = list[tuple["ref[nn.Module]", "ref[Any]"]]


class Uncompiled:
    """Compiled code runs uncompiled while any monitor looks; they may end in another order than they began."""

    def __init__(self) -> None:
        self.looking: set[object] = set()
        self.before: Stance | None = None
        self.lock = RLock()  # a garbage collection in here may end a monitor, which leaves

    def enter(self, looker: object) -> None:
        """Begin to look."""
        with self.lock:
            if self.before is None:
                self.before = compiler_stance() or Stance()
            self.looking.add(looker)
            torch.compiler.set_stance("force_eager")

    def leave(self, looker: object) -> None:
        """End it; after the last, compiled code runs as before, unless the stance was changed meanwhile."""
        if self.before is None:
            return
        with self.lock:
            self.looking.discard(looker)
            if self.looking or self.before is None:
                return
            now = compiler_stance()
            if now is None or now.stance == "force_eager":
                torch.compiler.set_stance(**self.before._asdict())
            self.before = None


uncompiled = Uncompiled()


class Hooks:
    """Where a monitor has hooks. It keeps no module alive."""

    def __init__(self) -> None:
        self.of_model: Noted = []
        self.of_layers: Noted = []
        self.of_leaves: list[RemovableHandle] = []  # tensors that outlive their graph

    def __getstate__(self) -> dict[str, Any]:
        """Leave them out: a copy has none."""
        return Hooks().__dict__

    def end(self) -> None:
        """End a forward: no layer has a hook, and compiled code runs again."""
        _take_back(self.of_layers)
        with suppress(RuntimeError):  # in compiled code
            uncompiled.leave(self)

    def release_leaves(self) -> None:
        """Take back what waits for gradients of leaves."""
        with suppress(IndexError):  # another thread
            while self.of_leaves:
                self.of_leaves[-1].remove()
                self.of_leaves.pop()

    def remove(self) -> None:
        """Take back all."""
        self.end()
        self.release_leaves()
        _take_back(self.of_model)


def _take_back(noted: Noted) -> None:
    with suppress(IndexError):  # another thread
        while noted:
            module, owner = noted[-1][0](), noted[-1][1]()
            if module is not None and owner is not None:
                remove_hooks(module, owner)
            noted.pop()

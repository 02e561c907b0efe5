"""What a VCL keeps of its latest training forward."""

from __future__ import annotations

from torch import Tensor

__all__ = ["LatestForward"]


class LatestForward:
    """The latest training forward: its loss, and what else a warning needs to know of it and of those before.

    An object of its own: an attribute of a module takes longer to set. Copies and pickles of a module start with a new
    one.
    """

    loss: Tensor | None = None
    in_grad_mode = True  # else the loss has no gradient
    acts: bool | None = None  # whether the call had VCL; None: it ran without grad mode, in a reentrant checkpoint
    had_rows = False  # enough for two sub-batches
    short = 0  # calls in a row that had fewer
    read = False  # by the handle
    replaced = 0  # losses in a row that the next call replaced before they were read, in a part that runs alone
    recomputes = False  # the present call is a checkpoint's: the loss of its forward stays, which has the graph

    def record(self, loss: Tensor, adds: bool) -> None:
        """Keep the loss of a call; ``adds`` to that of the calls before."""
        if self.recomputes:
            self.recomputes = False
        else:
            self.loss = self.loss + loss if adds and self.loss is not None else loss

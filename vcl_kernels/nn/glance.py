"""One look at the layers of a handle in one step of training, whichever modules the step calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..torch_private import may_be_compiled, plain_name
from .fused import Calls
from .handle import VCLHandle
from .look import Look, Settings
from .report import Report
from .rows import Rows
from .undo import Hooks, uncompiled

__all__ = ["Glance"]

OF_THE_VCL = Settings(every=1, sub_batch_size=None, unit=None, channel_dim=None)


class Glance:
    """What :class:`vcl_kernels.VCLMonitor` records, of one step that the caller marks by :meth:`begin` and :meth:`end`.

    The monitor waits for a forward of the model that it watches. A trainer's step may call parts of that model alone.
    Compiled code runs uncompiled in the step.
    """

    def __init__(self) -> None:
        self._report, self._hooks = Report(), Hooks()
        self._rows = Rows(None, None, None, self._report)
        self._look: Look | None = None

    def begin(self, handle: VCLHandle) -> None:
        """Hook the layers of ``handle``. While a CUDA graph is captured nothing is recorded."""
        self.cancel()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        layers = {
            module: plain_name(name)
            for name, module in handle.model.named_modules()
            if isinstance(getattr(module, "vcl", None), Calls)
        }
        if may_be_compiled():
            uncompiled.enter(self._hooks)
        self._look = Look(0, OF_THE_VCL, self._rows, self._report, self._hooks)
        self._look.begin(layers, nn.Module())

    def end(self) -> list[dict[str, Any]]:
        """Remove the hooks, and fetch what was recorded: a row for each call of a layer, as the monitor's."""
        if self._look is None:
            return []
        self._stop()
        rows = self._rows.flush()
        self._rows.fetched.clear()
        self._report.raise_untold()
        return rows

    def cancel(self) -> None:
        """Remove the hooks, and forget what was recorded: the step was not finished."""
        self._stop()
        self._rows.waiting.clear()

    def _stop(self) -> None:
        self._hooks.remove()
        if self._look is not None:
            self._look.end()
        self._look = None

"""The monitor: statistics of each layer's pre-activations during training. They stay on the device until flushed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..checks import check_channel_dim, check_choice, check_count
from ..options import UNITS, Unit
from ..torch_private import compiles_itself, inside_compiled
from .handle import VCLHandle
from .look import Settings
from .plot import plot
from .recorder import Recorder, tell_compiled
from .report import Report
from .rows import Rows
from .undo import Hooks

__all__ = ["VCLMonitor"]


class VCLMonitor:
    r"""Statistics of the input of every layer through training, with VCL or without.

    Layers are the activation modules of the model, its :class:`vcl_kernels.VCL` modules, and what has VCL by
    ``after=`` (whose output is measured in place of the input). They are found again at each step that is looked at.
    The input is what the layer gets after the hooks of others. Of a unit (a channel, or an activation), v_1 … v_K are
    the variances of all K = N // n sub-batches of n samples. The columns, after ``step`` and ``layer``:

    - ``loss``: the layer's part of :meth:`VCLHandle.loss` (weighted, not divided by ``accumulation``).
    - ``share``: ``‖g_vcl‖ / (‖g_vcl‖ + ‖g - g_vcl‖)``, g the gradient that arrives at the input, g_vcl the part of it
      from this layer's own loss. 0 where that loss is not in the objective; NaN before the backward pass, and after a
      second one through the same forward.
    - ``beta``, ``beta_least``: mean and least beta over units, as they act (at least ``beta_min``); NaN for the form
      ``"variance"``, and where FSDP has not gathered them.
    - ``scale``: the variance that beta asks for, mean over units: beta times the multiple of it at which the ratio is
      least in expectation, for Gaussian values (:func:`vcl_kernels.scale.variance_over_beta`); NaN for other forms.
    - ``variance``: ``v̄ = Σ v_k / K``, mean over units.
    - ``constancy``: ``Σ (v_k - v̄)² / ((K - 1) v̄²)``, mean over units that vary: 0 is perfect constancy; i.i.d.
      values of kurtosis κ have ``κ/M - (M - 3) / (M (M - 1))`` for M values in a sub-batch, a Gaussian 2 / (M - 1).
      NaN below 2n samples.
    - ``kurtosis``: ``E[(x - mean)⁴] / E[(x - mean)²]²`` over the batch, mean over units that vary: 3 for a Gaussian,
      1 for two points of equal weight.

    ``loss`` to ``scale`` are NaN where no VCL acted: the layer has none, it was paused, its input needs no gradient, or
    it is a part under reentrant checkpointing (VCL acts in the recomputation). A unit varies if its variance is more
    than that of rounding.

    The monitor never stops a training: what it cannot look at is in :attr:`skipped`, and a ``VCLWarning`` says so; if a
    filter makes that an error, :meth:`flush` raises it. Use the model in one thread at a time.
    Nothing is fetched from the device before :meth:`flush`, which fetches everything in one transfer. On
    other steps only two hooks run, which count forwards. Keep the monitor in a variable: when it goes, its hooks go,
    and what waits is written. A copy or a pickle of it has the rows, and watches nothing. A recomputation in
    checkpointing is no step. In distributed training, rank 0 writes.

    Args:
        model: any module with activation modules; what :func:`vcl_kernels.attach`, ``torch.compile`` or
            ``DistributedDataParallel`` returned. Compiled code runs uncompiled in the steps that are looked at.
        every: look at each ``every``-th training forward, from the first.
        sub_batch_size: n. None: the VCL's own where a layer has one, else 5.
        unit: ``"channel"`` or ``"activation"``. None: the VCL's own where a layer has one, else ``"channel"``.
        channel_dim: where inputs have their channels (-1 for ``(N, L, C)``). None: the VCL's own where a layer has one,
            else 1.
        csv: file to which :meth:`flush` appends a row for each step and layer.
        tensorboard: folder, or ``SummaryWriter``, to which :meth:`flush` writes scalars ``<statistic>/<layer>``.

    Attributes:
        model: what is watched, the model of a handle.
        rows: what was flushed, dictionaries of the columns. ``rows.clear()`` drops them.
        skipped: why a layer was left out, or one of its calls; the first reason of each.
        step: training forwards so far.

    Warns:
        VCLWarning: a layer is left out, a compiled model is not seen, no training forward was seen, rows could not be
            written.

    Raises:
        ValueError: no activation or VCL module in the model, a wrong setting, or ``csv`` exists with another header.
        FileNotFoundError: the folder of ``csv`` does not exist.
        ImportError: ``tensorboard`` names a folder, and the package tensorboard is not installed.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
    >>> with VCLMonitor(net, every=2) as monitor:
    ...     for _ in range(4):
    ...         y = net(torch.randn(32, 4))
    >>> [(row["step"], row["layer"]) for row in monitor.rows]
    [(0, '1'), (2, '1')]
    """

    def __init__(
        self,
        model: nn.Module | VCLHandle,
        *,
        every: int = 1,
        sub_batch_size: int | None = None,
        unit: Unit | None = None,
        channel_dim: int | None = None,
        csv: str | Path | None = None,
        tensorboard: Any = None,
    ) -> None:
        check_count("every", every, 1)
        if unit is not None:
            check_choice("unit", unit, UNITS)
        if sub_batch_size is not None:
            check_count("sub_batch_size", sub_batch_size, 1)
        if channel_dim is not None:
            check_channel_dim(channel_dim)
        self.model = model.model if isinstance(model, VCLHandle) else model
        folder = _folder(tensorboard) if isinstance(tensorboard, str | Path) else None
        self._report, self._hooks = Report(), Hooks()
        path = None if csv is None else Path(csv).absolute()
        self._rows = Rows(path, folder, None if folder else tensorboard, self._report)
        settings = Settings(every, sub_batch_size, unit, channel_dim)
        self._recorder = Recorder(_inside(self.model), settings, self._rows, self._report, self._hooks)
        if compiles_itself(self.model):
            tell_compiled(self._report)
        # Hooks refer to the recorder, which does not refer to the monitor: it goes when its last variable does.
        weakref.finalize(self, _close, os.getpid(), self._hooks, self._rows, self._report)
        weakref.finalize(self, _tell_dropped, self._report).atexit = False
        self._recorder.watch(self.model)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was flushed."""
        return self._rows.fetched

    @property
    def skipped(self) -> dict[str, str]:
        """Why a layer was left out, or one of its calls."""
        return self._report.skipped

    @property
    def step(self) -> int:
        """Training forwards so far."""
        return self._report.forwards

    def __repr__(self) -> str:
        seen = f"{self.step} training forwards, {len(self.rows)} rows, {len(self._rows.waiting)} waiting"
        return f"VCLMonitor of {type(self.model).__name__}: {seen}, {len(self.skipped)} skipped"

    def __enter__(self) -> VCLMonitor:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        if kind is not None:
            self._report.said.add("unseen")  # an error came before
        try:
            try:
                self.flush()
            finally:
                self.remove()
        except Exception as error:
            if kind is None:
                raise
            _tell_lost(self._report, error)
            self._report.untold.clear()

    def flush(self) -> list[dict[str, Any]]:
        """Fetch what waits on the device; write it to the CSV file and TensorBoard; return and keep its rows.

        If writing fails, the rows are in :attr:`rows`, and the next flush writes them too. Rows of a forward that runs
        wait for the next one.
        """
        self._recorder.end_what_was_left()
        if self._report.saw_nothing:
            self._report.tell(
                "unseen",
                "VCLMonitor saw no training forward of the model. Likely causes: it is in evaluation mode, it was "
                "compiled before (give the monitor what torch.compile returned), or only parts of it are called",
            )
        rows = self._rows.flush(self._recorder.unfinished())
        self._report.raise_untold()
        return rows

    def remove(self) -> None:
        """Take the hooks away. What waits can still be flushed, into the rows and the CSV file."""
        self._report.said.add("removed")
        self._hooks.remove()
        self._recorder.end()
        if self._rows.folder is not None:
            self._rows.flush()
            self._rows.close()

    def plot(self, path: str | Path | None = None, statistics: Sequence[str] | None = None) -> Any:
        """Draw each statistic of the flushed rows over steps, a line for each layer; return matplotlib's Figure.

        The panel of ``variance`` also has each layer's ``scale``, dashed. By default, statistics that are NaN
        everywhere are left out.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an unknown statistic, or nothing was flushed.
        """
        return plot(self.rows, path, statistics)


def _inside(model: nn.Module) -> nn.Module:
    """Return the module inside of what wraps it."""
    while True:
        inner = model.module if isinstance(model, DataParallel | DistributedDataParallel) else inside_compiled(model)
        if inner is model:
            return model
        model = inner


def _folder(tensorboard: str | Path) -> str:
    """Return the same folder wherever the process goes. One of a remote file system stays as it is."""
    return str(tensorboard) if "://" in str(tensorboard) else str(Path(tensorboard).absolute())


def _tell_dropped(report: Report) -> None:
    if report.saw_nothing:
        report.tell(
            "dropped",
            "a VCLMonitor was dropped before it saw a training forward. Keep it in a variable, or use it in a `with` "
            "statement",
        )


def _tell_lost(report: Report, error: Exception) -> None:
    report.tell("lost", f"a VCLMonitor is gone, and its last rows could not be written ({error})")


def _close(process: int, hooks: Hooks, rows: Rows, report: Report) -> None:
    """Remove the hooks, and write what waits: the monitor is gone, or the interpreter ends."""
    if os.getpid() != process:  # a fork has a copy of all this
        return
    hooks.remove()
    try:
        if rows.unwritten:
            rows.flush()
        rows.close()
    except Exception as error:
        _tell_lost(report, error)

"""Statistics of each layer's pre-activations during training. They stay on the device until flushed."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ..checks import channels_first, check_channel_dim, check_choice, check_count
from ..functional import sub_batch_moments
from ..geometry import accumulation_dtype
from ..options import UNITS, Unit
from ..reference import bounded_beta
from .fused import Calls, first_input
from .handle import VCLHandle
from .modules import VCLActivation
from .recognise import is_activation

__all__ = ["VCLMonitor"]

STATISTICS = ("loss", "beta", "beta_least", "variance", "constancy", "kurtosis")
COLUMNS = ("step", "layer", *STATISTICS)


class VCLMonitor:
    r"""Statistics of the input of every layer through training, with VCL or without.

    Layers are the activation modules of the model and its :class:`vcl_kernels.VCL` modules. Of a unit (a channel, or
    an activation), v_1 … v_K are the variances of all K = N // n sub-batches of n samples:

    - ``loss``: the layer's part of :meth:`VCLHandle.loss` (weighted); NaN where the layer has no VCL.
    - ``beta``, ``beta_least``: mean and least beta over units, as they act (at least ``beta_min``); NaN without one.
    - ``variance``: ``v̄ = Σ v_k / K``, mean over units.
    - ``constancy``: ``Σ (v_k - v̄)² / ((K - 1) v̄²)``, mean over units with v̄ > 0: 0 is perfect constancy; i.i.d.
      values of kurtosis κ have ``κ/M - (M - 3) / (M (M - 1))`` for M values in a sub-batch, a Gaussian 2 / (M - 1).
      NaN below 2n samples.
    - ``kurtosis``: ``E[(x - mean)⁴] / E[(x - mean)²]²`` over the batch, mean over units that vary: 3 for a Gaussian,
      1 for two points of equal weight.

    Nothing is fetched from the device before :meth:`flush`, which fetches everything in one transfer. Between the
    steps that are looked at, one hook counts; after :meth:`remove` there is none. Hooks make torch.compile compile
    anew: monitor the model before compiling it, or not at all.

    Args:
        model: any module with activation modules, or what :func:`vcl_kernels.attach` returned.
        every: look at each ``every``-th training forward, from the first.
        sub_batch_size: n. None: the VCL's own where a layer has one, else 5.
        unit: ``"channel"`` or ``"activation"``.
        channel_dim: where inputs have their channels (-1 for ``(N, L, C)``). None: the VCL's own where a layer has one,
            else 1.
        csv: file to which :meth:`flush` appends a row for each step and layer.
        tensorboard: folder, or ``SummaryWriter``, to which :meth:`flush` writes scalars ``<statistic>/<layer>``.

    Raises:
        ValueError: no activation or VCL module in the model, or a wrong setting.
        FileNotFoundError: the folder of ``csv`` does not exist.
        ImportError: ``tensorboard`` names a folder, and the package tensorboard is not installed.

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
        unit: Unit = "channel",
        channel_dim: int | None = None,
        csv: str | Path | None = None,
        tensorboard: Any = None,
    ) -> None:
        check_count("every", every, 1)
        check_choice("unit", unit, UNITS)
        if sub_batch_size is not None:
            check_count("sub_batch_size", sub_batch_size, 1)
        if channel_dim is not None:
            check_channel_dim(channel_dim)
        self.model = model.model if isinstance(model, VCLHandle) else model
        self.every, self.sub_batch_size, self.unit, self.channel_dim = every, sub_batch_size, unit, channel_dim
        self.rows: list[dict[str, Any]] = []  # flushed: of COLUMNS
        self.step = 0  # training forwards so far
        self._active = True
        self._layers = _layers(self.model)
        self._csv = None if csv is None else Path(csv)
        if self._csv is not None and not self._csv.parent.is_dir():
            raise FileNotFoundError(f"csv must be in a folder that exists; got {str(csv)!r}")
        self._owns_writer = isinstance(tensorboard, str | Path)
        self._writer = _summary_writer(tensorboard) if self._owns_writer else tensorboard
        # Calls in this forward: layer, how many calls of it came before, its VCL, statistics of its input
        self._recorded: list[tuple[str, int, VCLActivation | None, list[Tensor]]] = []
        self._waiting: list[tuple[int, str, Tensor]] = []  # step, layer, and its statistics on the device
        self._layer_hooks: list[RemovableHandle] = []
        self._model_hooks = [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def __enter__(self) -> VCLMonitor:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.flush()
        finally:
            self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle an inactive monitor with the rows: it goes with a copy of the model."""
        outside = {"_active": False, "_csv": None, "_writer": None}
        return self.__dict__ | outside | {"_recorded": [], "_waiting": [], "_layer_hooks": []}

    def flush(self) -> list[dict[str, Any]]:
        """Fetch what waits on the device; write it to the CSV file and TensorBoard; return and keep its rows."""
        if not self._waiting:
            return []
        waiting, self._waiting = self._waiting, []
        device = waiting[0][2].device
        fetched = torch.stack([values.to(device) for _, _, values in waiting]).tolist()
        rows: list[dict[str, Any]] = [
            dict(zip(COLUMNS, (step, layer, *values), strict=True))
            for (step, layer, _), values in zip(waiting, fetched, strict=True)
        ]
        self.rows += rows
        if self._csv is not None:
            with self._csv.open("a", newline="") as file:
                table = csv.DictWriter(file, COLUMNS)
                if file.tell() == 0:
                    table.writeheader()
                table.writerows(rows)
        if self._writer is not None:
            for row in rows:
                for name in STATISTICS:
                    if not math.isnan(row[name]):
                        self._writer.add_scalar(f"{name}/{row['layer']}", row[name], row["step"])
            self._writer.flush()
        return rows

    def remove(self) -> None:
        """Take the hooks away. What waits can still be flushed, into the rows and the CSV file."""
        for hook in [*self._model_hooks, *self._layer_hooks]:
            hook.remove()
        self._model_hooks, self._layer_hooks = [], []
        if self._writer is not None and self._owns_writer:
            self.flush()
            self._writer.close()
        self._writer = None

    def plot(self, path: str | Path | None = None, statistics: Sequence[str] = STATISTICS) -> Any:
        """Draw each statistic of the flushed rows over steps, a line for each layer; return matplotlib's Figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an unknown statistic, or nothing was flushed.
        """
        for name in statistics:
            check_choice("statistics", name, STATISTICS)
        if not self.rows:
            raise ValueError("plot() wants rows: call flush() after a training forward first")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("VCLMonitor.plot needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(3.6 * len(statistics), 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(statistics), squeeze=False)[0], statistics, strict=True):
            for layer in dict.fromkeys(row["layer"] for row in self.rows):
                line = [(row["step"], row[name]) for row in self.rows if row["layer"] == layer]
                axes.plot(*zip(*line, strict=True), label=layer)
            axes.set(title=name, xlabel="step")
        axes.legend(fontsize="small")
        if path is not None:
            figure.savefig(path)
        return figure

    def _before_forward(self, model: nn.Module, _args: tuple[Any, ...]) -> None:
        if model.training and self._active:
            if self.step % self.every == 0:
                for name, module in self._layers:
                    record = partial(self._record, name)
                    self._layer_hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
            self.step += 1

    def _record(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = sum(name == layer for layer, *_ in self._recorded)
        vcls = _vcls_of(module)
        vcl = vcls[min(call, len(vcls) - 1)] if vcls else None
        n = self.sub_batch_size or (vcl.sub_batch_size if vcl else 5)
        x = channels_first(first_input(args, kwargs), self.channel_dim or (vcl.channel_dim if vcl else 1))
        self._recorded.append((name, call, vcl, _statistics(x, n, self.unit)))

    def _after_forward(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        for hook in self._layer_hooks:
            hook.remove()
        recorded, self._recorded, self._layer_hooks = self._recorded, [], []
        for name, call, vcl, of_x in recorded:
            layer = f"{name}:{call}" if call else name
            self._waiting.append((self.step - 1, layer, torch.stack([*_of_vcl(vcl, of_x[0]), *of_x])))


@torch.no_grad()
def _statistics(x: Tensor, n: int, unit: Unit) -> list[Tensor]:
    """Variance, constancy and kurtosis of x, each a scalar on x's device."""
    x = x.detach().to(accumulation_dtype(x.dtype))
    over = [0] if unit == "activation" else [0, *range(2, x.dim())]
    square = (x - x.mean(over, keepdim=True)).square()
    kurtosis = _mean_of_varying(square.square().mean(over), square.mean(over))
    M = n if unit == "activation" else n * math.prod(x.shape[2:])
    if x.shape[0] < 2 * n or M < 2:
        nan = torch.full_like(kurtosis, torch.nan)
        return [nan, nan, kurtosis]
    _, var = sub_batch_moments(x, n, unit=unit)
    mean = var.mean(0)
    return [mean.mean(), _mean_of_varying(var.var(0), mean), kurtosis]


def _mean_of_varying(numerator: Tensor, variance: Tensor) -> Tensor:
    """Mean over units of numerator / variance², without units whose variance is 0 (NaN stays)."""
    varying = variance != 0
    return torch.where(varying, numerator / variance.square(), 0.0).sum() / varying.sum()


@torch.no_grad()
def _of_vcl(vcl: VCLActivation | None, like: Tensor) -> list[Tensor]:
    """Loss, mean beta and least beta, each a scalar of ``like``'s dtype on its device."""
    nan = torch.full_like(like, torch.nan)
    if vcl is None or vcl.latest.loss is None:
        return [nan, nan, nan]
    if vcl.beta is None:
        beta = nan if vcl.form == "variance" else like.new_full((), vcl.beta_init)
    else:
        beta = nan if is_lazy(vcl.beta) else vcl.beta.to(like)
    beta = torch.as_tensor(bounded_beta(beta, vcl.beta_min))
    return [vcl.latest.loss.detach().to(like), beta.mean(), beta.min()]


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules to watch, by name. A VCL that attach gave to another module is watched there."""
    attached = {vcl for calls in model.modules() if isinstance(calls, Calls) for vcl in calls}
    layers = [
        (name or type(model).__name__, module)
        for name, module in model.named_modules()
        if module not in attached and (_vcls_of(module) or is_activation(module))
    ]
    if not layers:
        raise ValueError(f"model ({type(model).__name__}) has no activation or VCL module to monitor")
    return layers


def _vcls_of(module: nn.Module) -> list[VCLActivation]:
    """Return ``module`` if it is a VCL, else those that attach gave it."""
    if isinstance(module, VCLActivation):
        return [module]
    calls = getattr(module, "vcl", None)
    return list(calls) if isinstance(calls, Calls) else []  # type: ignore[arg-type]


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard= needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder))

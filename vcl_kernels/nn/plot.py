"""Pictures of what a monitor recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checks import check_choice
from .rows import STATISTICS

__all__ = ["plot"]

Line = tuple[list[float], list[float]]

IN_A_ROW = 4  # panels
IN_A_LEGEND = 16  # layers: more have a colour bar


def plot(rows: list[dict[str, Any]], path: str | Path | None = None, statistics: Sequence[str] | None = None) -> Any:
    """Draw statistics of a monitor's rows over steps, a line for each layer; return matplotlib's Figure.

    Args:
        rows: of one monitor, in the order of its steps.
        path: where to save the picture.
        statistics: which. None: those that are not NaN everywhere. Variance is drawn with its scale, dashed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an unknown statistic, none of them, or no rows.
    """
    if statistics is not None and not statistics:
        raise ValueError("statistics must name at least one, or be None")
    for name in statistics or ():
        check_choice("statistics", name, STATISTICS)
    if not rows:
        raise ValueError("plot() wants rows: call flush() after a training forward first")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("VCLMonitor.plot needs matplotlib: pip install matplotlib") from error
    names = list(_seen(rows) if statistics is None else statistics)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    of_few, of_many = colormaps["tab10"], colormaps["viridis"]
    colours = [of_few(i) if len(layers) <= 10 else of_many(i / (len(layers) - 1)) for i in range(len(layers))]
    columns = max(1, min(IN_A_ROW, len(names)))
    figure = Figure(figsize=(3.6 * columns + 1.6, 3.0 * math.ceil(len(names) / columns)), layout="constrained")
    panels = [figure.add_subplot(math.ceil(len(names) / columns), columns, i + 1) for i in range(len(names))]
    for axes, name in zip(panels, names, strict=True):
        for layer, colour in zip(layers, colours, strict=True):
            steps, values = _line(rows, layer, name)
            axes.plot(steps, values, label=layer, color=colour, **_points(values))
            if name == "variance":
                steps, values = _line(rows, layer, "scale")
                axes.plot(steps, values, color=colour, linestyle="--", linewidth=1, **_points(values))
        axes.set(title=name, xlabel="step")
        if name == "variance" and not all(math.isnan(row["scale"]) for row in rows):
            axes.set_ylabel("dashed: scale, which beta asks for", fontsize="small")
        if name in ("variance", "scale"):
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
    _name_layers(figure, panels, layers, of_many)
    if path is not None:
        figure.savefig(path)
    return figure


def _seen(rows: list[dict[str, Any]]) -> list[str]:
    """Return the statistics that are not NaN everywhere. Scale is shown with variance."""
    seen = [name for name in STATISTICS if not all(math.isnan(row[name]) for row in rows)]
    return [name for name in seen if name != "scale" or "variance" not in seen] or ["variance"]


def _line(rows: list[dict[str, Any]], layer: str, name: str) -> Line:
    """Return steps and values of a layer, with a gap where steps begin anew: a file may have several runs."""
    steps: list[float] = []
    values: list[float] = []
    for row in rows:
        if row["layer"] == layer:
            if steps and row["step"] <= steps[-1]:
                steps.append(math.nan)
                values.append(math.nan)
            steps.append(row["step"])
            values.append(row[name])
    return steps, values


def _points(values: list[float]) -> dict[str, Any]:
    """Return the settings by which a value between gaps, of which no line is drawn, is a point."""
    gaps = [True, *map(math.isnan, values), True]
    return {"marker": ".", "markevery": [i for i in range(len(values)) if gaps[i] and gaps[i + 2]]}


def _name_layers(figure: Any, panels: list[Any], layers: list[str], of_many: Any) -> None:
    """Tell which colour is which layer: a legend beside the panels, or a colour bar with some of the names."""
    if len(layers) <= IN_A_LEGEND:
        lines = [line for line in panels[0].lines if line.get_linestyle() == "-"]
        numbers = [str(i) for i in range(len(layers))]  # a label that begins with "_" is left out
        legend = figure.legend(lines, numbers, loc="outside right upper", fontsize="small")
        for text, layer in zip(legend.get_texts(), layers, strict=True):
            text.set(text=layer, parse_math=False)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    named = sorted({round(i * (len(layers) - 1) / 9) for i in range(10)})
    bar = figure.colorbar(ScalarMappable(Normalize(0, len(layers) - 1), of_many), ax=panels, label="layer")
    bar.set_ticks(named, labels=[layers[i] for i in named], fontsize="small")
    bar.ax.invert_yaxis()  # the first layer on top

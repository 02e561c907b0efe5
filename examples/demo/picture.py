"""The picture: learning curves, and what enters a middle ELU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window system, and Agg for a PNG
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

METHODS = {"none": "no normalisation", "bn": "batch norm", "vcl": "VCL"}
COLOURS = {"none": "#555555", "bn": "#0072B2", "vcl": "#D55E00"}  # Okabe and Ito: told apart by the colour-blind
LINES = {"none": ":", "bn": "--", "vcl": "-"}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def draw(results: dict[str, dict[str, Any]], title: str, scored_on: str, path: Path) -> None:
    """Write the picture of ``results``, as the JSON file has them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))  # type: ignore[misc]
        curves(left.subplots(), results, scored_on)
        rows = right.subplots(len(results), sharex=True, sharey=True, squeeze=False)[:, 0]
        rows[0].set_title("What enters the third ELU: density", loc="left", fontsize=11)
        rows[-1].set_xlabel("standard deviations from the channel's mean")
        for axes, (method, result) in zip(rows, results.items(), strict=True):
            histogram(axes, method, result["pre_activations"])
        figure.savefig(path, dpi=150)


def curves(axes: Axes, results: dict[str, dict[str, Any]], scored_on: str) -> None:
    for method, result in results.items():
        error = 100 * (1 - np.array(result["test_accuracy"]))
        epochs = np.arange(1, error.shape[1] + 1)
        axes.plot(epochs, error.mean(0), LINES[method], color=COLOURS[method], linewidth=2, label=METHODS[method])
        if len(error) > 1:
            axes.fill_between(epochs, error.min(0), error.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
    seeds = len(next(iter(results.values()))["test_accuracy"])
    among = f"; mean, least and greatest of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"{scored_on.capitalize()} error, %{among}", loc="left", fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend()


def histogram(axes: Axes, method: str, found: dict[str, Any]) -> None:
    axes.stairs(found["density"], found["edges"], fill=True, color=COLOURS[method], alpha=0.8)
    axes.text(0.01, 0.95, METHODS[method], transform=axes.transAxes, va="top", color=COLOURS[method])
    text = f"kurtosis {found['kurtosis']:.2f}"
    axes.text(0.99, 0.95, text, transform=axes.transAxes, va="top", ha="right", color=COLOURS[method])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)

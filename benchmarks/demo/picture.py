"""The picture: learning curves, and what enters a middle ELU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .learner import METHODS

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter  # noqa: E402

COLOURS = {"none": "#555555", "bn": "#0072B2", "vcl": "#D55E00"}  # Okabe and Ito: told apart by the colour-blind
LINES = {"none": ":", "bn": "--", "vcl": "-"}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def draw(results: dict[str, dict[str, Any]], title: str, scored_on: str, path: Path) -> None:
    """Write the picture of ``results``, as the JSON file has them."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 4.5), layout="constrained")
        grid = figure.add_gridspec(len(results), 2, width_ratios=(1.25, 1))
        curves(figure.add_subplot(grid[:, 0]), results, scored_on)
        top: Axes | None = None
        for row, method in enumerate(results):
            axes = figure.add_subplot(grid[row, 1], sharex=top, sharey=top)
            top = top or axes
            histogram(axes, method, results[method]["pre_activations"], last=row == len(results) - 1)
        top.set_title("What enters the third ELU", loc="left", fontsize=11)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=150)
        plt.close(figure)


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


def histogram(axes: Axes, method: str, found: dict[str, Any], *, last: bool) -> None:
    axes.stairs(found["density"], found["edges"], fill=True, color=COLOURS[method], alpha=0.8)
    axes.text(0.01, 0.95, METHODS[method], transform=axes.transAxes, va="top", color=COLOURS[method])
    text = f"kurtosis {found['kurtosis']:.2f}"
    axes.text(0.99, 0.95, text, transform=axes.transAxes, va="top", ha="right", color=COLOURS[method])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelbottom=last)
    if last:
        axes.set_xlabel("standard deviations from the channel's mean")

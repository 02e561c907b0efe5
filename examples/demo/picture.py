"""The picture: variance by layer, test likelihood, differences in error, and the modes of channels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure  # not pyplot: no window system, and Agg for a PNG
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from .learning import METHODS

COLOURS = {"none": "#555555", "bn": "#0072B2", "vcl": "#D55E00", "modes": "#009E73"}  # Okabe and Ito
LINES = {"none": ":", "bn": "--", "vcl": "-"}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
EXAMPLES = ("none", "bn", "modes")  # whose channels are shown
SHADES = (0.25, 0.42, 0.6, 0.8, 1.0)  # opacity of a layer's line, from the first layer to the last


def digest(record: Path) -> str:
    """Return a hash of the JSON file that a picture shows; it stands in the picture's ``Source``."""
    return hashlib.sha256(record.read_bytes()).hexdigest()


def draw(found: dict[str, Any], record: Path, path: Path) -> None:
    """Write the picture of ``found``, which is what the JSON file ``record`` has."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.2), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.05), hspace=0.04)  # type: ignore[misc]
        left, right = top.subfigures(1, 2, width_ratios=(1.5, 1), wspace=0.03)
        variances(left, found)
        likelihood(right.subplots(), found)
        left, right = bottom.subfigures(1, 2, width_ratios=(1.5, 1), wspace=0.03)
        modes(left, found)
        prices(right.subplots(), found)
        figure.savefig(path, dpi=120, metadata={"Source": digest(record)})


def runs(found: dict[str, Any], method: str, of: str) -> np.ndarray:
    """Return what was measured along a method's trainings: (splits, …)."""
    return np.array([run[of] for run in found["methods"][method]["runs"]], dtype=float)


def variances(figure: SubFigure, found: dict[str, Any]) -> None:
    heading(figure, "Variance of what enters each ELU, mean over splits")
    epochs = [0, *found["tested_after"]]
    row = figure.subplots(1, len(LINES), sharex=True, sharey=True)
    for axes, method in zip(row, LINES, strict=True):
        mean = runs(found, method, "variance").mean(0)
        for layer, shade in enumerate(SHADES):
            axes.plot(epochs, mean[:, layer], color=COLOURS[method], alpha=shade, linewidth=2.2, label=layer + 1)
        axes.set_title(METHODS[method], color=COLOURS[method], fontsize=11)
        axes.set_yscale("log")
        axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    row[0].yaxis.set_major_formatter(ScalarFormatter())
    row[0].yaxis.set_minor_formatter(NullFormatter())
    row[-1].legend(title="layer", loc="upper center", fontsize=9, ncols=5, handlelength=0.8, columnspacing=0.7)
    row[1].set_xlabel("epoch")


def likelihood(axes: Axes, found: dict[str, Any]) -> None:
    splits = len(found["methods"]["none"]["runs"])
    for method, line in LINES.items():
        nll = runs(found, method, "test_nll")
        epochs, spread = found["tested_after"], nll.std(0, ddof=1) if splits > 1 else 0 * nll[0]
        mean = nll.mean(0)
        axes.plot(epochs, mean, line, color=COLOURS[method], linewidth=2.2, label=METHODS[method])
        axes.fill_between(epochs, mean - spread, mean + spread, color=COLOURS[method], alpha=0.15, linewidth=0)
    axes.set_title("Test negative log-likelihood", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right", title=f"mean ± standard deviation, {splits} splits" if splits > 1 else None)


def modes(figure: SubFigure, found: dict[str, Any]) -> None:
    heading(figure, "What enters the last ELU: the channels of least kurtosis, first split")
    rows: Any = figure.subfigures(len(EXAMPLES), 1, height_ratios=(1, 1, 1.42))
    for row, method in zip(rows, EXAMPLES, strict=True):
        seen = found["methods"][method]["runs"][0]["histograms"]
        median = found["summary"]["rows"][method]["kurtosis"]
        text = f"{described(found, method)}: median kurtosis of all channels {median:.2f}"
        row.suptitle(text, x=0.01, ha="left", fontsize=11, color=COLOURS[method])
        for axes, channel in zip(row.subplots(1, len(seen), sharex=True), seen, strict=True):
            axes.stairs(channel["density"], channel["edges"], fill=True, color=COLOURS[method], alpha=0.85)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.set_xticks([-2, 0, 2])
            axes.tick_params(labelbottom=method == EXAMPLES[-1])
            if channel["kurtosis"] is not None:
                axes.annotate(f"{channel['kurtosis']:.1f}", (0.98, 1), xycoords="axes fraction", ha="right", va="top")
    text = "standard deviations from the mean; the number: kurtosis (Gaussian 3, two equal points 1)"
    rows[-1].supxlabel(text, fontsize=11)


def described(found: dict[str, Any], method: str) -> str:
    if method != "modes":
        return METHODS[method]
    return f"VCL of {found['modes']['unit']}s, weight {found['modes']['weight']:g}"


def prices(axes: Axes, found: dict[str, Any]) -> None:
    """Differences in error from no normalisation."""
    names = ("bn", "vcl", "modes")
    rows = found["summary"]["rows"]
    for i, method in enumerate(names):
        difference = rows[method]["error_difference"]
        axes.errorbar(
            difference["mean"], -i, xerr=difference["half"], color=COLOURS[method], fmt="o", capsize=5, markersize=8,
            linewidth=2.2,
        )  # fmt: skip
        text = f"{described(found, method)}: {rows[method]['test_error']:.2f} %, {rows[method]['splits']} splits"
        axes.annotate(
            text, (difference["mean"], -i), (0, 12), textcoords="offset points", ha="center", color=COLOURS[method],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.axvline(0, color=COLOURS["none"], linestyle=":", linewidth=2)
    none = rows["none"]["test_error"]
    axes.set_title("Test error, paired difference from no normalisation", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(f"points, with 95 % intervals (no normalisation: {none:.2f} %)")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-len(names) + 0.5, 0.7)
    axes.margins(x=0.25)


def heading(figure: SubFigure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")

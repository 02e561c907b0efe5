"""The figures of the page of findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.demo.picture import STYLE

from . import mixture
from .methods import METHODS
from .statistics import profiles
from .work import Record

COLOURS = {"none": "#555555", "bn": "#0072B2", "ln": "#009E73", "vcl-ratio": "#D55E00", "vcl-relative": "#E69F00"}
COLOURS["vcl"] = COLOURS["vcl-ratio"]


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_profiles(errors: dict[str, np.ndarray], methods: list[str], path: Path) -> None:
    """One panel for each activation."""
    factors = np.geomspace(1, 3, 200)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, len(errors), sharey=True, squeeze=False)[0]
        for axes, (activation, found) in zip(panels, errors.items(), strict=True):
            for method, line in zip(methods, profiles(found, factors).T, strict=True):
                axes.step(factors, line, where="post", color=COLOURS[method], label=METHODS[method])
            axes.set(title=activation, xlabel="error, as a multiple of the least of all methods", xscale="log")
            axes.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"], minor=False)
            axes.minorticks_off()
        panels[0].set_ylabel("share of the sets")
        panels[-1].legend(fontsize="small")
        save(figure, path)


def draw_mixture(rows: list[Record], path: Path) -> None:
    """|cos θ| of every unit over the prior."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        forms = list(dict.fromkeys(row["form"] for row in rows))
        panels = figure.subplots(1, len(forms), sharey=True, squeeze=False)[0]
        for axes, form in zip(panels, forms, strict=True):
            of = [row for row in rows if row["form"] == form]
            axes.plot([r["prior"] for r in of], [r["cosine"] for r in of], ".", color=COLOURS["vcl"], alpha=0.4)
            axes.axvline(mixture.THRESHOLD, color="#555555", linestyle=":")
            axes.set(title=form, xlabel="prior p of one Gaussian; dotted: p (1 - p) = 1/6")
        panels[0].set_ylabel("|cos θ|: 1 separated, 0 joined")
        save(figure, path)


def draw_layers(rows: list[Record], histograms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Kurtosis of each layer through training (above), histograms of the third layer (below)."""
    methods = list(histograms)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), layout="constrained")
        above, below = figure.subplots(2, len(methods), sharey="row")
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        for axes, low, method in zip(above, below, methods, strict=True):
            for depth, layer in enumerate(layers):
                of = [row for row in rows if row["method"] == method and row["layer"] == layer]
                steps = sorted({row["step"] for row in of})
                means = [np.mean([row["kurtosis"] for row in of if row["step"] == step]) for step in steps]
                axes.plot(steps, means, color=COLOURS[method], alpha=0.3 + 0.7 * depth / len(layers), label=depth + 1)
            axes.set(title=method, xlabel="step")
            for found, when in zip(histograms[method], ("before", "halfway", "after"), strict=True):
                colour = "#AAAAAA" if when == "before" else COLOURS[method]
                low.stairs(
                    found["density"], found["edges"], color=colour, alpha=0.5 if when == "halfway" else 1, label=when
                )
            low.set_xlabel("standard deviations from the mean")
        above[0].set_ylabel("kurtosis")
        above[-1].legend(title="layer", fontsize="x-small")
        below[0].set_ylabel("density, third layer")
        below[-1].legend(fontsize="x-small")
        save(figure, path)


def draw_beta(rows: list[Record], path: Path) -> None:
    """Mean beta of each layer through training, over seeds."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        for depth, layer in enumerate(layers):
            of = [row for row in rows if row["method"] == "vcl" and row["layer"] == layer]
            steps = sorted({row["step"] for row in of})
            betas = [np.mean([row["beta"] for row in of if row["step"] == step]) for step in steps]
            axes.plot(steps, betas, color=COLOURS["vcl"], alpha=0.3 + 0.7 * depth / len(layers), label=depth + 1)
        axes.set(title="beta, mean of a layer's channels and of seeds", xlabel="step")
        axes.legend(title="layer", fontsize="x-small")
        save(figure, path)

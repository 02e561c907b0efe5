"""The figures of the page What VCL does."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from examples.demo.picture import STYLE

from ..figures import save
from ..work import Record
from .expected import expected_ratio, least
from .learning import target

# Okabe and Ito's colours, each with a line and a marker of its own
LOOKS = {
    2: ("#000000", ":", "x"),
    3: ("#56B4E9", (0, (1, 1)), "P"),
    5: ("#D55E00", "-", "o"),
    10: ("#E69F00", "--", "s"),
    25: ("#009E73", "-.", "^"),
    100: ("#0072B2", (0, (6, 2)), "D"),
    1000: ("#CC79A7", (0, (4, 1, 1, 1, 1, 1)), "v"),
}
CURVE = np.geomspace(1e-2, 1e4, 301)  # variance / beta
SHOWN = (2e-3, 4.0)  # of the expected loss
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw_expected(path: Path) -> None:
    """The expected loss over variance / beta; a marker where it is least."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.4), layout="constrained")
        axes = figure.subplots()
        for M, (colour, line, marker) in LOOKS.items():
            loss = expected_ratio(CURVE, M)
            axes.plot(CURVE, loss, linestyle=line, color=colour, linewidth=2)
            axes.plot(*least(M), marker, color=colour, markersize=8, markeredgecolor="white" if marker != "x" else None)
            axes.plot([], [], linestyle=line, marker=marker, color=colour, label=f"{M}")
        axes.set(xscale="log", yscale="log", ylim=SHOWN, xlim=(CURVE[0], CURVE[-1]))
        axes.set(xlabel="variance / β", ylabel="expected loss of the ratio")
        axes.set_title("Where the ratio is least (markers), and how steep it is", loc="left")
        plain(axes)
        axes.legend(title="M, values in a\nsub-batch", loc="center left", bbox_to_anchor=(1.0, 0.5))
        save(figure, path)


def draw_ends(rows: list[Record], path: Path) -> None:
    """The variance at the end: over the prediction for a fixed beta, and over that at the start for the others."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        fixed(left, [row for row in rows if row["part"] == "targets"])
        beside(right, rows)
        save(figure, path)


def fixed(axes: Axes, rows: list[Record]) -> None:
    """Each start is a marker: they lie on each other where all of them end at the same variance."""
    for M in dict.fromkeys(row["M"] for row in rows):
        colour, _, marker = LOOKS[M]
        of = [row for row in rows if row["M"] == M]
        predicted = [target(M, row["beta"]) for row in of]
        axes.plot(
            predicted, [row["variance"] for row in of], marker, color=colour, alpha=0.6, markersize=8, label=f"{M}"
        )
    identity(axes, [target(row["M"], row["beta"]) for row in rows])
    axes.set(xlabel="variance that β asks for", ylabel="variance at the end")
    axes.set_title("β fixed: every start ends at the target", loc="left")
    axes.legend(title="M", ncols=2, loc="upper left")


MODES = {  # by mode(): label, colour, marker and line
    ("ratio", "fixed"): ("ratio, β fixed at 1", "#D55E00", "o-"),
    ("ratio", "learned"): ("ratio, β learned from 1", "#E69F00", "s--"),
    ("ratio", "running"): ("ratio, β running", "#0072B2", "^-."),
    ("relative_variance", "small"): ("relative variance, β = 1e-5", "#000000", "D:"),
    ("relative_variance", "large"): ("relative variance, β = 1", "#CC79A7", "v:"),
}


def mode(row: Record) -> tuple[str, str]:
    """Return the form and what becomes of its beta."""
    if row["form"] == "ratio":
        return "ratio", row["beta_mode"]
    return row["form"], "large" if row["beta"] == 1 else "small"


def beside(axes: Axes, rows: list[Record], M: int = 5) -> None:
    """The variance at the end over that at the start, where beta = 1."""
    rows = [row for row in rows if row["part"] in ("targets", "forms") and row["M"] == M and row["beta"] in (1, 1e-5)]
    for kind, (label, colour, look) in MODES.items():
        of = [row for row in rows if mode(row) == kind]
        axes.plot([r["first"] for r in of], [r["variance"] for r in of], look, color=colour, label=label)
    identity(axes, [row["first"] for row in rows])
    axes.set(xlabel="variance at the start", ylabel="variance at the end")
    axes.set_title(f"M = {M}: what each β does to three starts", loc="left")
    axes.legend(fontsize="small", loc="upper left")


def identity(axes: Axes, values: list[float]) -> None:
    ends = min(values) / 2, max(values) * 2
    axes.plot(ends, ends, color="#AAAAAA", linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log")
    plain(axes)


def plain(axes: Axes) -> None:
    """Write 0.01 and 100, not powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator())
        axis.set_major_formatter(PLAIN)
    axes.minorticks_off()

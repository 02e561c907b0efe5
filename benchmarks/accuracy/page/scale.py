"""The measurements on the page What VCL does, which stand there between two markers."""

from __future__ import annotations

from pathlib import Path

from .. import mixture, results
from ..scale.learning import target
from ..work import Record
from .markdown import made, none_yet, table

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MODES_AT = (0.1, 0.2, 0.3, 0.5)  # priors
NAMES = {("ratio", "learned"): "ratio, β learned from 1", ("ratio", "running"): "ratio, β running"}


def filled(page: str, folder: Path) -> str:
    """Return ``page`` with the measurements of ``folder`` between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([before + BEGIN, "", *section(folder), END]) + after


def section(folder: Path) -> list[str]:
    """Return the two tables."""
    rows, expected = results.read("scale", folder), results.read("scale-expected", folder)
    if not rows:
        return none_yet("What the measurements showed", "python -m benchmarks.accuracy scale")
    return [*of_expectation(expected), *of_targets(rows), *of_others(rows), *of_modes(results.read("mixture", folder))]


def of_expectation(rows: list[Record]) -> list[str]:
    """Return the table of the integral, by the number of values."""
    columns = ("loss", "loss_at_100_beta", "slope_at_a_quarter", "slope_at_four_times")
    lines = [[str(r["M"]), f"{r['variance_over_beta']:.3g}", *(f"{r[c]:.2g}" for c in columns)] for r in rows]
    header = [
        "M",
        "target: variance / β",
        "expected loss there",
        "at 100 β",
        "pull at target / 4",
        "pull at 4 · target",
    ]
    return [
        "The expected ratio of Gaussian values. Pull is its derivative by the logarithm of the variance: below 0 it "
        "pushes the variance up, above 0 down. " + made("scale", "scale-expected"),
        "",
        *table(header, lines),
    ]


def of_targets(rows: list[Record]) -> list[str]:
    """Return the table of fixed betas: the variance at the end as a multiple of the target."""
    lines = []
    starts = sorted({row["start"] for row in rows})
    for part, what in (("targets", "gain of each unit"), ("weights", "all weights")):
        for M in dict.fromkeys(row["M"] for row in rows if row["part"] == part):
            of = [row for row in rows if (row["part"], row["M"]) == (part, M)]
            ends = [[r["variance"] / target(M, r["beta"]) for r in of if r["start"] == start] for start in starts]
            lines.append([what, str(M), *(span(found) for found in ends)])
    betas = ", ".join(f"{beta:g}" for beta in sorted({r["beta"] for r in rows if r["part"] == "targets"}))
    header = ["learns", "M", *(f"from {start:g} · target" for start in starts)]
    return [
        "A linear layer that learns by the ratio alone, β fixed: variance at the end / target (the least and the "
        f"greatest of β = {betas}; with all weights, β = 1). Adam, {rows[0]['steps']:,} steps. "
        + made("scale", "scale"),
        "",
        *table(header, lines),
    ]


def of_others(rows: list[Record]) -> list[str]:
    """Return the table of what has no fixed target: the variance at the end as a multiple of that at the start."""
    lines = []
    of = [row for row in rows if row["part"] == "forms"]
    for M, form, mode, beta in dict.fromkeys((r["M"], r["form"], r["beta_mode"], r["beta"]) for r in of):
        same = [r for r in of if (r["M"], r["form"], r["beta_mode"], r["beta"]) == (M, form, mode, beta)]
        name = NAMES.get((form, mode), f"relative_variance, β = {beta:g}")
        ends = [f"{r['first']:.3g} → {r['variance']:.3g}" for r in same]
        betas = ", ".join(f"{r['beta_end']:.3g}" for r in same) if form == "ratio" else ""
        lines.append([str(M), name, *ends, betas])
    header = ["M", "form and β", "small start", "at the target of β = 1", "large start", "β at the end"]
    return [
        "The same with other β and relative_variance (by SGD: Adam would take full steps on a slope of 1e-5): variance "
        "at the start → at the end.",
        "",
        *table(header, lines),
    ]


def of_modes(rows: list[Record]) -> list[str]:
    """Return the table of a mixture of two Gaussians, by the prior of one."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = []
    for prior in MODES_AT:
        line = [f"{prior:g}", f"{prior * (1 - prior):.3f}"]
        for form in forms:
            of = [row for row in rows if (row["form"], row["prior"]) == (form, prior)]
            separated = sum(row["cosine"] > mixture.SEPARATED for row in of)
            kurtosis = sum(row["kurtosis"] for row in of) / len(of)
            line += [f"{separated} of {len(of)}", f"{kurtosis:.2f}"]
        lines.append(line)
    header = ["prior p", "p (1 - p)", *(part for form in forms for part in (f"{form}: separated", "kurtosis"))]
    return [
        f"A mixture of two Gaussians, {mixture.DISTANCE:g} standard deviations apart, through a linear unit that "
        "learns by VCL alone, β = 0: units that separate the two, and their kurtosis (3 for a Gaussian). "
        + made("modes", "mixture"),
        "",
        *table(header, lines),
    ]


def span(values: list[float]) -> str:
    """Return the least and the greatest value, or the only one."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"

"""The sections of the modes."""

from __future__ import annotations

from pathlib import Path

from .. import mixture, results
from ..work import Record
from .markdown import linked, made, none_yet, table


def section(folder: Path) -> list[str]:
    """Return the sections of the modes."""
    rows = results.read("mixture", folder)
    found = ["## Two Gaussians through a linear unit", ""]
    if not rows:
        found = none_yet("Two Gaussians through a linear unit", "python -m benchmarks.accuracy modes")
    else:
        lines = []
        for form in dict.fromkeys(row["form"] for row in rows):
            of = [row for row in rows if row["form"] == form]
            priors = sorted({row["prior"] for row in of})
            place, half = mixture.threshold(priors, [[r["cosine"] for r in of if r["prior"] == p] for p in priors])
            lines.append([form, f"{place:.4f} ± {half:.4f}", f"{place * (1 - place):.4f}"])
        found += [
            "A unit that learns by VCL alone separates the two where p (1 - p) > 1/6 = 0.1667, p > "
            f"{mixture.THRESHOLD:.4f}, by the theory, and joins them below. The table has the prior at which "
            f"{len({r['unit'] for r in rows})} units turned (± from a bootstrap over units; the priors tried there are "
            "0.005 apart). The theory is of the variance of sample variances over their squared mean, which "
            "relative_variance is; the ratio divides by a noisy sample variance, and its turning point is its own. "
            + made("modes", "mixture"),
            "",
            *table(["form", "prior p at which units turn", "p (1 - p)"], lines),
            "![Joined or separated](findings/mixture.png)",
            "",
        ]
    rows = results.read("layers", folder)
    if not rows:
        return [*found, *none_yet("Layers through training", "python -m benchmarks.accuracy modes")]
    lines = []
    steps = sorted({row["step"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        for depth, layer in enumerate(dict.fromkeys(row["layer"] for row in rows)):
            of = [r for r in rows if r["method"] == method and r["layer"] == layer]
            first, last = ([r for r in of if r["step"] == step] for step in (steps[0], steps[-1]))
            beta = "" if method != "vcl" else f"{_mean(first, 'beta')} → {_mean(last, 'beta')}"
            changes = [f"{_mean(first, name)} → {_mean(last, name)}" for name in ("kurtosis", "constancy", "variance")]
            lines.append([method, str(depth + 1), *changes, beta])
    seeds = len({row["seed"] for row in rows})
    return [
        *found,
        "## Layers through training",
        "",
        f"The demo's network on {seeds} seeds, as `VCLMonitor` sees it: from the first step to step {steps[-1]}, mean "
        "of channels and seeds, ± between seeds. Constancy is the relative variance of the sub-batch variances (0 is "
        "best); VCL is the ratio with weight 0.01 and channel units. "
        f"{linked('layers')}, by the same command.",
        "",
        *table(["method", "layer", "kurtosis", "constancy", "variance", "beta"], lines),
        "![Kurtosis and histograms](findings/layers.png)",
        "",
        "![Path of beta](findings/beta.png)",
        "",
    ]


def _mean(rows: list[Record], name: str) -> str:
    mean, half = results.mean_and_error([row[name] for row in rows])
    return f"{mean:.3g} ± {half:.1g}" if half == half else f"{mean:.3g}"

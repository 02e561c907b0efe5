"""The page of findings: rendered from the results, so that no number in it is typed."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from . import figures, results
from .comparisons import LEAST_SEEDS, LEVEL, SAME_WITHIN, VERDICTS
from .methods import ACTIVATIONS, METHODS
from .page import cifar, defaults, images, modes, scale, segmentation, settings, tabular
from .page.markdown import table
from .scale.figures import draw_ends, draw_expected

GUIDE = "what_vcl_does.md"  # beside the page: its measurements are rendered too

HEAD = f"""# Findings

Does VCL help, and with which settings? Every number on this page comes from a file in
[benchmarks/results/accuracy](../benchmarks/results/accuracy), and the page itself from
`python -m benchmarks.accuracy report`.

± is half of a 95 % confidence interval, of that comparison alone. p is of a paired test, corrected by Holm's method for
the number of comparisons: those of VCL with no normalisation and batch norm in one table of images, or with one network
among the settings; all ten pairs of methods on UCI and KEEL sets. The verdicts:

- better, worse: p is below {LEVEL}.
- the same: it is not, and the whole interval lies within ±{SAME_WITHIN} points.
- undecided: neither.
- too few seeds: fewer than {LEAST_SEEDS}; nothing is said, whatever the interval.
"""

LIMITS = [
    "These are short trainings of small networks on small data. The paper's claim is of long ones: its 11-layer",
    "network on CIFAR-10 and CIFAR-100, for hundreds of epochs. A smaller form of that is under way (next section).",
    "Settings were compared by their test error, and so was the advice drawn from them: it is a lead for other data,",
    "not a result on it.",
    "",
]


def run(options: argparse.Namespace, console: Console) -> None:
    """Write the page and its figures; fill in the measurements of the guide beside it, if it is there."""
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(render(options.results))
    draw(options.results, options.page.with_suffix(""))
    console.print(f"wrote {options.page}")
    guide = options.page.with_name(GUIDE)
    if guide.exists():
        guide.write_text(scale.filled(guide.read_text(), options.results))
        draw_guide(options.results, guide.with_suffix(""))
        console.print(f"wrote the measurements of {guide}")


def render(folder: Path) -> str:
    """Return the page for the results in ``folder``."""
    sections = [
        line
        for part in (defaults, cifar, tabular, images, segmentation, settings, modes)
        for line in part.section(folder)
    ]
    return "\n".join([HEAD, *in_short(folder), *sections]).rstrip() + "\n"


def in_short(folder: Path) -> list[str]:
    """Return how often each verdict was given."""
    counts = Counter(verdicts(folder))
    if not counts:
        return []
    rows = [
        [study, METHODS[other], *(str(counts[study, other, said]) for said in VERDICTS)]
        for study, other in dict.fromkeys(key[:2] for key in counts)
    ]
    header = ["study", "VCL against", *VERDICTS]
    return ["## In short", "", f"{counted(counts)}.", "", *table(header, rows), *LIMITS]


def counted(counts: Counter[tuple[str, str, str]]) -> str:
    """Return the verdicts of all studies in a sentence, which the README has too."""
    total = Counter[str]()
    for (_, _, said), count in counts.items():
        total[said] += count
    same = f"the same within {SAME_WITHIN} points"
    return (
        f"Of {total.total()} comparisons with no normalisation and batch norm, VCL was better in {total['better']}, "
        f"worse in {total['worse']}, {same} in {total['the same']}, undecided in {total['undecided']}, and "
        f"{total['too few seeds']} had too few seeds"
    )


def verdicts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield study, other method and verdict of each comparison of a VCL with no normalisation or batch norm."""
    for part in (tabular, images, settings):
        yield from part.verdicts(folder)


def draw(folder: Path, out: Path) -> None:
    """Draw each figure whose results are there."""
    rows = results.read("tabular", folder)
    if rows:
        tables = {activation: tabular.errors(rows, activation) for activation in ACTIVATIONS}
        figures.draw_profiles(tables, list(METHODS), out / "profiles.png")
    rows = results.read("mixture", folder)
    if rows:
        figures.draw_mixture(rows, out / "mixture.png")
    rows = results.read("layers", folder)
    if rows:
        histograms = json.loads((folder / "layers.json").read_text())["settings"]["histograms"]
        figures.draw_layers(rows, histograms, out / "layers.png")
        figures.draw_beta(rows, out / "beta.png")


def draw_guide(folder: Path, out: Path) -> None:
    """Draw the figures of the guide."""
    draw_expected(out / "expected.png")
    rows = results.read("scale", folder)
    if rows:
        draw_ends(rows, out / "ends.png")

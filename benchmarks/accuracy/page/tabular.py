"""The section of the tabular study."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import results
from ..comparisons import verdict
from ..methods import ACTIVATIONS, METHODS, VCL
from ..statistics import compare
from ..work import Record
from .markdown import OTHERS, made, none_yet, table

TITLE = "Fully connected networks on UCI and KEEL sets"


def verdicts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield study, other method and verdict of each comparison of a VCL with no normalisation or batch norm."""
    rows = results.read("tabular", folder)
    for activation in ACTIVATIONS if rows else ():
        pairs = compare(by_set(rows, activation, percent), list(METHODS))["pairs"]
        for a in (method for method in METHODS if method in VCL):
            for b in OTHERS:
                yield f"UCI and KEEL sets, {activation}", b, _pair(pairs, a, b)[-1]


def by_set(rows: list[Record], activation: str, value: Any) -> np.ndarray:
    """Return the mean over splits of ``value`` of a row, (sets, methods)."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["activation"] == activation:
            cells.setdefault((row["set"], row["method"]), []).append(value(row))
    sets = list(dict.fromkeys(name for name, _ in cells))
    return np.array([[np.mean(cells[name, method]) for method in METHODS] for name in sets])


def percent(row: Record) -> float:
    return 100 * float(row["accuracy"])


def errors(rows: list[Record], activation: str) -> np.ndarray:
    """Error rates with one more error on two more rows, so that none is 0."""
    return by_set(rows, activation, lambda row: ((1 - row["accuracy"]) * row["tested"] + 1) / (row["tested"] + 2))


def section(folder: Path) -> list[str]:
    """Return the section of the tabular study."""
    rows = results.read("tabular", folder)
    if not rows:
        return none_yet(TITLE, "python -m benchmarks.accuracy tabular")
    settings = json.loads((folder / "tabular.json").read_text())["settings"]
    counts = Counter(name for name, _ in {(row["set"], row["split"]) for row in rows})
    least, most = min(counts.values()), max(counts.values())
    splits = f"{most}" if least == most else f"{least} to {most}"
    found = [
        f"## {TITLE}",
        "",
        f"{len(counts)} sets, {splits} stratified split(s) of each; four hidden "
        f"layers of 64; {settings['trials']} trials of a random search (learning rate, weight decay; for VCL its "
        "weight too), scored on a quarter of the training rows, then "
        f"{settings['steps']} steps on all of them: the same for every method. "
        + made(f"tabular --splits {most}", "tabular"),
        "",
    ]
    for activation in ACTIVATIONS:
        c = compare(by_set(rows, activation, percent), list(METHODS))
        lines = [
            [METHODS[m], f"{c['mean_accuracy'][m]:.2f}", f"{c['mean_rank'][m]:.2f}", f"{c['wins'][m]:.1f}"]
            for m in METHODS
        ]
        found += [f"### {activation}", "", f"Friedman's test over the five methods: p = {c['friedman_p']:.2g}.", ""]
        found += table(["method", "mean accuracy, %", "mean rank", "wins (shared)"], lines)
        found += table(
            ["difference in accuracy, points", "mean over sets", "Nemenyi p", "Wilcoxon-Holm p", "the first is"],
            [_pair(c["pairs"], a, b) for a in ("vcl-ratio", "vcl-relative") for b in ("none", "bn", "ln")],
        )
    return [*found, "![Performance profiles](findings/profiles.png)", ""]


def _pair(pairs: dict[tuple[str, str], dict[str, Any]], a: str, b: str) -> list[str]:
    pair, sign = (pairs[a, b], 1) if (a, b) in pairs else (pairs[b, a], -1)
    mean, half = sign * pair["difference"][0], pair["difference"][1]
    decided = verdict(mean, half, pair["wilcoxon_p"])
    tests = [f"{pair['nemenyi_p']:.2g}", f"{pair['wilcoxon_p']:.2g}"]
    return [f"{METHODS[a]} - {METHODS[b]}", f"{mean:+.2f} ± {half:.2f}", *tests, decided]

"""The section of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .. import results
from ..comparisons import Comparison, cell, judge, paired
from ..work import Record
from .images import remarks
from .markdown import OTHERS, made, none_yet, table

Setting = tuple[str, str, str]  # network, what is changed, its value


def verdicts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield study, other method and verdict of each comparison of a VCL with no normalisation or batch norm."""
    compared = setting_comparisons(setting_errors(results.read("sensitivity", folder)))
    for ((network, _, _), other), found in compared.items():
        yield f"settings, {network}", other, found.verdict


def section(folder: Path) -> list[str]:
    """Return the section of the settings."""
    rows = results.read("sensitivity", folder)
    title = "Sensitivity to the settings"
    if not rows:
        return none_yet(title, "python -m benchmarks.accuracy sensitivity")
    seen = setting_errors(rows)
    compared = setting_comparisons(seen)
    lines = []
    for (network, changed, value), of in seen.items():
        cells = []
        for other in OTHERS:
            found = compared.get(((network, changed, value), other))
            base = {} if value == other else beside(seen, network, changed, other)
            cells.append(cell(of, base) if found is None else str(found))
        as_it_is = {} if (changed, value) == ("form", "ratio") else seen.get((network, "form", "ratio"), {})
        cells.append("" if (network, changed, "none") in seen and changed != "method" else cell(of, as_it_is))
        mean, half = results.mean_and_error(list(of.values()))
        lines.append([network, changed, value, str(len(of)), f"{mean:.2f} ± {half:.2f}", *cells])
    text = (
        f"Digits, {rows[0]['images']} training images, {rows[0]['epochs']} epochs; ELU, He's initialisation, learning "
        "rate 0.05, weight 0.01, n = 5 and channel units but where changed; a method beside others under the same "
        "learning rate, activation and initialisation; differences paired by seed; Holm's correction within a network. "
        + " ".join([made("sensitivity", "sensitivity"), *remarks(rows)])
    )
    header = [
        "network",
        "changed",
        "value",
        "seeds",
        "test error, %",
        "difference from none",
        "from batch norm",
        "from ratio as it is",
    ]
    return [f"## {title}", "", text, "", *table(header, lines)]


def beside(seen: dict[Setting, dict[int, float]], network: str, changed: str, method: str) -> dict[int, float]:
    """Return the errors of a method under the same change of the training, or else as it is."""
    return seen.get((network, changed, method)) or seen.get((network, "method", method), {})


def setting_comparisons(
    seen: dict[Setting, dict[int, float]],
) -> dict[tuple[Setting, str], Comparison]:
    """Return each VCL beside no normalisation and batch norm; a network's are one family."""
    judged: dict[tuple[Setting, str], Comparison] = {}
    for network in dict.fromkeys(setting[0] for setting in seen):
        family = {
            (setting, other): paired(errors, beside(seen, network, setting[1], other))
            for setting, errors in seen.items()
            for other in (OTHERS if setting[0] == network and setting[2] not in OTHERS else ())
        }
        judged |= judge({key: found for key, found in family.items() if found is not None})
    return judged


def setting_errors(rows: list[Record]) -> dict[Setting, dict[int, float]]:
    """Errors by network, what is changed and its value, and seed."""
    found: dict[Setting, dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["network"], str(row["changed"]), str(row["value"])), {})[row["seed"]] = row["error"]
    return found

"""A record as Markdown: ``python -m benchmarks.speed.report FILE.json …`` writes FILE.md beside each.

Times are medians in ms. Percentages are shares of the copy's bandwidth, measured in the same run: the bytes that the
job must move, by the time it took. (q1 to q3 of every time, and every sample, are in the JSON.)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .. import markdown

Entry = dict[str, Any]
Record = dict[str, Any]
Case = dict[tuple[str, str], Entry]  # by candidate and phase

COLUMNS = {  # what the README shows of a suite: heading, candidate, what its time is divided by
    "loss": [
        ("relative_variance, n = 8: of the copy", "relative_variance", "copy"),
        ("of batch norm", "relative_variance", "batch norm"),
        ("of the reference", "relative_variance", "reference"),
        ("ratio pair, n = 5: of the copy", "ratio", "copy"),
        ("of batch norm", "ratio", "batch norm"),
    ],
    "activation": [
        ("ELU with a ratio pair: of F.elu", "elu with ratio", "elu"),
        ("of batch norm + F.elu", "elu with ratio", "batch norm, elu"),
        ("ELU with relative_variance: of F.elu", "elu with relative_variance", "elu"),
        ("of batch norm + F.elu", "elu with relative_variance", "batch norm, elu"),
        ("ReLU with a ratio pair: of F.relu", "relu with ratio", "relu"),
        ("ReLU with relative_variance: of F.relu", "relu with relative_variance", "relu"),
        ("GELU with a ratio pair: of F.gelu", "gelu with ratio", "gelu"),
        ("SiLU with a ratio pair: of F.silu", "silu with ratio", "silu"),
    ],
    "networks": [
        ("batch norm", "batch norm", "no normalisation"),
        ("VCL, one ratio pair", "VCL, ratio", "no normalisation"),
        ("VCL, relative_variance", "VCL, relative_variance", "no normalisation"),
    ],
}
SHOWN = 7  # cases in the README's tables


def by_case(record: Record) -> dict[str, Case]:
    """Return a record's entries by case, candidate and phase, in its order."""
    found: dict[str, Case] = {}
    for entry in record["benchmarks"]:
        found.setdefault(entry["case"], {})[entry["candidate"], entry["phase"]] = entry
    return found


def share(case: Case, entry: Entry) -> float | None:
    """Return the share of the copy's bandwidth that an entry reached, if its floor is known."""
    copy = case.get(("copy", "both"))
    if copy is None or "floor_bytes" not in entry:
        return None
    return float(entry["floor_bytes"] / entry["median"] / (copy["floor_bytes"] / copy["median"]))


def ratios(record: Record, shown: int | None = None) -> str:
    """Return a suite's ratios of medians of forward + backward, as the README shows them."""
    columns = COLUMNS[record["suite"]]
    rows = []
    for name, case in list(by_case(record).items())[:shown]:
        cells = []
        for _, candidate, by in columns:
            pair = [case.get((which, "both")) for which in (candidate, by)]
            cells.append(f"{pair[0]['median'] / pair[1]['median']:.2f}x" if pair[0] and pair[1] else "")
        rows.append([name, *cells])
    return markdown.table(["case", *(heading for heading, _, _ in columns)], rows)


def table(record: Record, corner: str, cells_of: Callable[[Case], dict[str, str]]) -> str:
    """Return a row for each case and a column for each name that a case has."""
    rows = {name: cells_of(case) for name, case in by_case(record).items()}
    names = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = ([case, *(cells.get(name, "") for name in names)] for case, cells in rows.items())
    return markdown.table([corner, *names], lines)


def times(phase: str, case: Case) -> dict[str, str]:
    """Return every candidate's median time of a phase, with its share of the copy's bandwidth where that is known."""

    def cell(candidate: str) -> str:
        reached = share(case, case[candidate, phase])
        known = "" if reached is None or candidate == "copy" else f" ({100 * reached:.0f} %)"
        return f"{1e3 * case[candidate, phase]['median']:.4g}{known}"

    return {candidate: cell(candidate) for candidate, timed in case if timed == phase}


def megabytes(key: str, case: Case) -> dict[str, str]:
    """Return a number of bytes of each candidate that has it."""
    return {c: f"{e[key] / 1e6:.4g}" for (c, phase), e in case.items() if phase == "both" and key in e}


def floors(case: Case) -> dict[str, str]:
    """Return what the copy reached, and the bytes that each job must move."""
    copy = case["copy", "both"]
    return {"copy, GB/s": f"{copy['floor_bytes'] / copy['median'] / 1e9:.1f}", **megabytes("floor_bytes", case)}


def render(record: Record) -> str:
    """Return the whole report of a record."""
    machine, entries = record["machine_info"], record["benchmarks"]
    parts = [f"# {record['suite']}: {machine['device']}", ", ".join(f"{k}: {v}" for k, v in machine.items())]
    if record["suite"] in COLUMNS:
        parts += ["## Ratios of forward + backward", ratios(record)]
    for phase, title in {"both": "Forward + backward", "forward": "Forward", "backward": "Backward"}.items():
        if any(entry["phase"] == phase for entry in entries):
            parts += [f"## {title}, ms (share of the copy's bandwidth)", table(record, "ms", partial(times, phase))]
    if any("floor_bytes" in entry for entry in entries):
        parts += ["## Bytes that must move, forward + backward", table(record, "MB", floors)]
    if any("held_bytes" in entry for entry in entries):
        parts += ["## Held for backward", table(record, "MB", partial(megabytes, "held_bytes"))]
    return "\n\n".join(parts) + "\n"


def write(path: Path) -> str:
    """Write the report of the record at ``path`` beside it; return it."""
    text = render(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))

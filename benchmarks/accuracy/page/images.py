"""The section of the image studies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from .. import results
from ..comparisons import Comparison, cell, judge, paired
from ..data import SPLIT_BY_US
from ..methods import IMAGE_METHODS, VCL, redundant
from ..work import Record
from .markdown import OTHERS, asked_for, linked, made, none_yet, table

Case = tuple[str, str, int, str]  # network, activation, batch, method


def verdicts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield study, other method and verdict of each comparison of a VCL with no normalisation or batch norm."""
    for name in image_studies(folder):
        for (_, other), found in image_comparisons(name, folder).items():
            yield name.replace("-", ", ", 1), other, found.verdict


def image_studies(folder: Path) -> list[str]:
    """Return the names of the image studies that have results."""
    return sorted(path.stem for path in folder.glob("images-*.json"))


def section(folder: Path) -> list[str]:
    """Return the section of the image studies."""
    title = "Convolutional networks on images"
    found = [line for name in image_studies(folder) for line in image_study(name, folder)]
    if not found:
        return none_yet(title, "python -m benchmarks.accuracy images")
    text = (
        "VCL with weight 0.01, n = 5 and one statistic for each activation, as in the paper, but where it says channel "
        "units; differences paired by seed; times on one core of a machine that others used too."
    )
    return [f"## {title}", "", text, "", *found]


def image_study(name: str, folder: Path) -> list[str]:
    """Return what one image study found."""
    rows, asked = results.read(name, folder), json.loads((folder / f"{name}.json").read_text())["settings"]
    seen, costs = image_errors(rows), {_case(row): row for row in rows}
    likelihoods = image_errors(rows, "nll") if "nll" in rows[0] else {}
    compared = image_comparisons(name, folder)
    lines = []
    for case, same in seen.items():
        network, activation, batch, method = case
        mean, half = results.mean_and_error(list(same.values()))
        cells = []
        for other in OTHERS:
            found = compared.get((case, other))
            base = {} if method == other else seen.get((*case[:-1], other), {})
            cells.append(cell(same, base) if found is None else str(found))
        if likelihoods:
            cells.append("{:.3f} ± {:.3f}".format(*results.mean_and_error(list(likelihoods[case].values()))))
        cost = costs[case]
        spent = [f"{cost['step_ms']:.1f}", f"{cost['saved_bytes'] / 1e6:.1f}"] if cost.get("step_ms") else ["", ""]
        which = f"{network}, {activation}, batch {batch}"
        lines.append([which, IMAGE_METHODS[method], str(len(same)), f"{mean:.2f} ± {half:.2f}", *cells, *spent])
    header = ["network", "method", "seeds", "test error, %", "difference from none", "from batch norm"]
    header += ["negative log-likelihood"] if likelihoods else []
    text = [made(f"images {asked_for(asked)}", name), *remarks(rows)]
    for earlier, cases in repeated(name, folder).items():
        batches = ", ".join(str(batch) for batch in sorted({case[2] for case in cases}))
        text.append(f"Runs in batches of {batches} that {linked(earlier)} has too are judged there.")
    images = f"{rows[0]['images']} training images, " if rows[0]["images"] else ""
    title = f"### {rows[0]['dataset']}, {images}{rows[0]['epochs']} epochs"
    return [title, "", " ".join(text), "", *table([*header, "step, ms", "saved for backward, MB"], lines)]


def remarks(rows: list[Record]) -> list[str]:
    """Return what has to be known of older results."""
    found = []
    if "split" not in rows[0]:
        if rows[0]["dataset"] in SPLIT_BY_US:
            found.append("All seeds have the same test images.")
        found.append("Batch norm's scale was decayed as weights are.")
        if any(row["network"] == "elu-11" for row in rows):
            found.append(
                "The 11-layer network was then not quite the authors': four of its five dropouts stood a layer early, "
                "and convolutions under batch norm had no bias."
            )
    if any(redundant(row["method"], row["batch"]) for row in rows):
        found.append("At batch 10 the ratio has all the pairs that there are: counted once.")
    return found


def image_errors(rows: list[Record], column: str = "error") -> dict[Case, dict[int, float]]:
    """Errors by case (the method last) and seed."""
    found: dict[Case, dict[int, float]] = {}
    for row in rows:
        if not redundant(row["method"], row["batch"]):
            found.setdefault(_case(row), {})[row["seed"]] = math.nan if row[column] == "" else row[column]
    return found


def image_comparisons(name: str, folder: Path) -> dict[tuple[Case, str], Comparison]:
    """Return each VCL of a study beside no normalisation and batch norm, but for what an earlier study judges."""
    seen = image_errors(results.read(name, folder))
    elsewhere = {case for cases in repeated(name, folder).values() for case in cases}
    family = {
        (case, other): paired(errors, seen.get((*case[:-1], other), {}))
        for case, errors in seen.items()
        for other in (OTHERS if case[-1] in VCL and case not in elsewhere else ())
    }
    return judge({key: found for key, found in family.items() if found is not None})


def repeated(name: str, folder: Path) -> dict[str, set[Case]]:
    """Return, for each earlier study, the cases of VCL in which ``name`` has the same runs."""
    rows, studies = results.read(name, folder), image_studies(folder)
    found = {}
    for earlier in studies[: studies.index(name)]:
        others = results.read(earlier, folder)
        if others and all(others[0][column] == rows[0][column] for column in ("dataset", "images", "epochs")):
            a, b = image_errors(rows), image_errors(others)
            found[earlier] = {case for case in a if case[-1] in VCL and a[case] == b.get(case)}
    return {earlier: cases for earlier, cases in found.items() if cases}


def _case(row: Record) -> Case:
    return row["network"], row["activation"], row["batch"], row["method"]

"""The section of segmentation."""

from __future__ import annotations

from pathlib import Path

from .. import results
from ..segmentation import METHODS, compared
from .markdown import made, none_yet, table

TITLE = "Segmentation"


def section(folder: Path) -> list[str]:
    """Return the section."""
    records = results.read("segmentation", folder)
    if not records:
        return none_yet(TITLE, "python -m benchmarks.accuracy segmentation --processes 2")
    judged, rows = compared(records), []
    sizes = list(dict.fromkeys(record["batch_size"] for record in records))
    for method in METHODS:
        cells = []
        for size in sizes:
            of = [r["iou"] for r in records if (r["method"], r["batch_size"]) == (method, size)]
            mean, half = results.mean_and_error(of)
            beside = judged.get((size, method))
            said = "" if beside is None else f"; {beside.gain:+.1f} ± {beside.half:.1f}, {beside.verdict}"
            cells.append(f"{mean:.1f} ± {half:.1f}{said}")
        rows.append([method, *cells])
    text = (
        "MNIST digits on a larger canvas; a small U-Net with ELU labels each pixel with its digit, or background. Mean "
        "IoU in %, then the difference from no normalisation, paired by seed (above 0 is better), and its verdict. "
        "Planned after a look: while the example was written, activation units were seen to do harm. "
        + made("segmentation --processes 2", "segmentation")
    )
    return [f"## {TITLE}", "", text, "", *table(["method", *(f"batches of {size}" for size in sizes)], rows)]

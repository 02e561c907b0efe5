"""The README's table from a results file: ``python -m benchmarks.table FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """Render a file of ``benchmarks.cpu --out`` as Markdown."""
    lines = [
        "| shape | relative_variance, n = 8: of the copy | of batch norm | of the reference "
        "| ratio pair, n = 5: of the copy | of batch norm |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads(path.read_text())["results"]:
        m = row["median_seconds"]
        rv, ratio = m["relative_variance"], m["ratio"]
        cells = [rv / m["copy"], rv / m["batch_norm"], rv / m["reference"], ratio / m["copy"], ratio / m["batch_norm"]]
        lines.append(f"| {tuple(row['shape'])} | " + " | ".join(f"{value:.2f}x" for value in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))

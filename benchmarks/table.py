"""Ratios of medians from a record of ``benchmarks.cpu``, as Markdown: ``python -m benchmarks.table FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {  # suite: (heading, candidate, what it is compared with)
    "loss": [
        ("relative_variance, n = 8: of the copy", "relative_variance", "copy"),
        ("of batch norm", "relative_variance", "batch_norm"),
        ("of the reference", "relative_variance", "reference"),
        ("ratio pair, n = 5: of the copy", "ratio", "copy"),
        ("of batch norm", "ratio", "batch_norm"),
    ],
    "activation": [
        ("ELU with a ratio pair: of F.elu", "elu ratio", "elu"),
        ("of batch norm + F.elu", "elu ratio", "batch_norm elu"),
        ("ELU with relative_variance: of F.elu", "elu relative_variance", "elu"),
        ("of batch norm + F.elu", "elu relative_variance", "batch_norm elu"),
        ("ReLU with a ratio pair: of F.relu", "relu ratio", "relu"),
        ("ReLU with relative_variance: of F.relu", "relu relative_variance", "relu"),
        ("GELU with a ratio pair: of F.gelu", "gelu ratio", "gelu"),
        ("SiLU with a ratio pair: of F.silu", "silu ratio", "silu"),
    ],
}


def table(record: dict[str, Any]) -> str:
    """Render a record as Markdown."""
    columns = COLUMNS[record["suite"]]
    lines = ["| shape | " + " | ".join(heading for heading, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in record["results"]:
        m = row["median_seconds"]
        cells = [f"{m[of] / m[by]:.2f}x" for _, of, by in columns]
        lines.append(f"| {tuple(row['shape'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))

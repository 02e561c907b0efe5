"""A table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table(columns: list[str], rows: Iterable[Iterable[object]]) -> str:
    """Return the lines of a table, without a line break at the end."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (columns, *rows)]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines)

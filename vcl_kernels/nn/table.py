"""The table of a handle: each layer, what became of it, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch.nn.parameter import is_lazy

from .beta import said
from .modules import VCLActivation

__all__ = ["LEFT_OUT", "Row", "aligned", "summary", "table"]

LEFT_OUT = "left out"


class Row(NamedTuple):
    """A layer, or what could have been one."""

    layer: str
    activation: str  # the type of the module, or the function that was called
    vcl: str  # "fused", "before", "after", or "left out"
    beta: str  # what it is, known to its VCL; or why the layer is left out


def table(rows: list[Row], layers: dict[str, VCLActivation]) -> str:
    """Return the rows as aligned columns under their names."""
    lines = [Row._fields, *(row if row.vcl == LEFT_OUT else (*row[:3], _beta(layers[row.layer])) for row in rows)]
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as aligned columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def summary(rows: list[Row]) -> str:
    """Return how many layers have VCL, and how."""
    kinds = [row.vcl for row in rows]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds) if kind != LEFT_OUT]
    left_out = kinds.count(LEFT_OUT)
    layers = len(rows) - left_out
    text = f"{layers} layer{'s' * (layers != 1)} with VCL" + (f": {', '.join(counts)}" if counts else "")
    return f"{text}; {left_out} left out" if left_out else text


def _beta(vcl: VCLActivation) -> str:
    """Return a fixed beta's value, a learned one's shape, or "running"; and where the channels are."""
    lazy = vcl.beta is not None and is_lazy(vcl.beta)
    shape = "" if vcl.beta is None else "from the first batch" if lazy else str(tuple(vcl.beta.shape))
    text = shape if vcl.beta_mode == "learned" else said(vcl.beta, vcl.beta_mode, vcl.beta_init, vcl.form)
    return text if vcl.channel_dim == 1 else f"{text}, channel_dim={vcl.channel_dim}"

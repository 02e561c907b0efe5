"""The records as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from .targets import LATENCY, TARGETS, bytes_to_keep_in_flight

Record = dict[str, Any]

HEAD = """# Machine code of every kernel

Made by `python -m benchmarks.structure`, without a GPU, by torch {torch} and triton {triton}: {count} different
kernels, of {launches} launches at the benchmark's shapes. A row shows a kernel's launch of fewest programs.

Warps on a multiprocessor = warps of a block · blocks, blocks the least of: warps / warps of a block;
4 · floor(512 / registers rounded up to 8) / warps of a block; shared memory / (a block's + what the system keeps);
most blocks. Waves = programs / (blocks · multiprocessors). In flight: bytes of a tile, of each tensor read, ·
blocks on a multiprocessor; wanted is bandwidth · {latency:g} µs / multiprocessors (Little's law).
Sources of the limits are in `benchmarks/structure/targets.py`.
"""


def markdown(record: Record) -> str:
    """Render limits, a summary and the full table."""
    kernels = record["kernels"]
    launches = sum(row["launches"] for row in kernels)
    head = HEAD.format(**record["versions"], count=len(kernels), launches=launches, latency=LATENCY * 1e6)
    parts = [head, _limits(record["targets"]), "## Summary\n", _summary(record)]
    if record.get("first_steps"):
        parts.append(_first_steps(record))
    return "\n".join([*parts, _full(record)])


def _table(columns: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [" | ".join(map(str, row)) for row in [columns, *rows]]
    return "\n".join([f"| {lines[0]} |", "|---" * len(columns) + "|", *(f"| {line} |" for line in lines[1:])]) + "\n"


def _limits(targets: list[str]) -> str:
    columns = ["target", "device", "multiprocessors", "GB/s", "warps", "blocks", "registers", "shared KiB"]
    found = []
    for name in targets:
        of = TARGETS[name]
        cells = [name, of.device, of.multiprocessors, of.gigabytes_per_second, of.warps, of.blocks, of.registers]
        found.append([*cells, of.shared >> 10, f"{bytes_to_keep_in_flight(name) / 1024:.0f}"])
    return _table([*columns, "in flight KiB"], found)


def _summary(record: Record) -> str:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for row in record["kernels"]:
        for target in record["targets"]:
            groups[row["kernel"], target].append(row[target])
    columns = ["kernel", "target", "kernels", "registers", "spills", "least warps", "in flight KiB"]
    found = []
    for (kernel, target), at in sorted(groups.items()):
        registers = [a["registers"] for a in at]
        warps = f"{min(a['resident_warps'] for a in at)} of {TARGETS[target].warps}"
        in_flight = f"{min(a['in_flight_when_full'] for a in at) / 1024:.0f}"
        cells = [kernel, target, len(at), f"{min(registers)} to {max(registers)}", max(a["spills"] for a in at)]
        found.append([*cells, warps, in_flight, *(_widest(at, kind) for kind in ("loads", "stores"))])
    return _table([*columns, "loads up to", "stores up to"], found)


def _first_steps(record: Record) -> str:
    text = (
        "## The first training step\n\n"
        "Kernels that the activations of a network take, forward and backward, and the seconds until one process has"
        f" compiled them for {record['targets'][0]} with an empty cache.\n\n"
    )
    columns = ["network", "form", "kernels", "seconds"]
    return text + _table(columns, ([row[name] for name in columns] for row in record["first_steps"]))


def _widest(at: list[Record], kind: str) -> str:
    """How many of the kernels have which widest access."""
    counts = Counter(max(map(int, a[kind]), default=0) for a in at)
    return ", ".join(f"{bits} bits: {counts[bits]}" for bits in sorted(counts, reverse=True))


def _full(record: Record) -> str:
    text = (
        "## Every kernel\n\n"
        "Of each target: registers of a thread, warps on a multiprocessor, waves, widths of loads / of stores in bits"
        " (gfx: of the machine code, else of PTX), shared memory in bytes, spills if there are any; `SASS`: widths of"
        " LDG / STG, and float64 instructions of all instructions.\n\n"
    )
    columns, found = ["kernel", "case", "call", "tile", "warps", "programs"], []
    for row in record["kernels"]:
        tile = " ".join(f"{axis}={size}" for axis, size in row["tile"].items())
        cells = [tile if name == "tile" else row[name] for name in columns]
        found.append([*cells, *(_cell(row[target]) for target in record["targets"])])
    return text + _table([*columns, *record["targets"]], found)


def _cell(at: Record) -> str:
    parts = [f"{at['registers']} r", f"{at['resident_warps']} w", f"{at['waves']:.3g} waves", _widths(at)]
    if at["shared"]:
        parts.append(f"{at['shared']} B")
    if at["spills"]:
        parts.append(f"**spills {at['spills']}**")
    if "sass" in at:
        sass = at["sass"]
        parts.append(f"SASS {_widths(sass)}, {sass['float64']} of {sass['instructions']}")
    return "; ".join(parts)


def _widths(of: Record) -> str:
    return " / ".join(" ".join(of[kind]) or "none" for kind in ("loads", "stores"))

"""The records as Markdown."""

from __future__ import annotations

from collections import defaultdict
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
    parts.append(_full(record))
    return "\n".join(parts)


def _limits(targets: list[str]) -> str:
    lines = [
        "| target | device | multiprocessors | GB/s | warps | blocks | registers | shared KiB | in flight KiB |",
        "|---" * 9 + "|",
    ]
    for name in targets:
        of = TARGETS[name]
        wanted = bytes_to_keep_in_flight(name) / 1024
        cells = [name, of.device, of.multiprocessors, of.gigabytes_per_second, of.warps, of.blocks, of.registers]
        lines.append(_line([*cells, of.shared >> 10, f"{wanted:.0f}"]))
    return "\n".join(lines) + "\n"


def _summary(record: Record) -> str:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for row in record["kernels"]:
        for target in record["targets"]:
            groups[row["kernel"], target].append(row)
    lines = [
        "| kernel | target | kernels | registers | spills | least warps | in flight KiB | loads up to | stores up to |",
        "|---" * 9 + "|",
    ]
    for (kernel, target), rows in sorted(groups.items()):
        at = [row[target] for row in rows]
        of = TARGETS[target]
        least = min(a["resident_warps"] for a in at)
        registers = f"{min(a['registers'] for a in at)} to {max(a['registers'] for a in at)}"
        in_flight = min(a["in_flight_when_full"] for a in at) / 1024
        cells = [kernel, target, len(rows), registers, max(a["spills"] for a in at), f"{least} of {of.warps}"]
        lines.append(_line([*cells, f"{in_flight:.0f}", *(_widest(at, kind) for kind in ("loads", "stores"))]))
    return "\n".join(lines) + "\n"


def _first_steps(record: Record) -> str:
    lines = [
        "## The first training step\n",
        "Kernels that the activations of a network take, forward and backward, and the seconds until one process has"
        f" compiled them for {record['targets'][0]} with an empty cache.\n",
        "| network | form | kernels | seconds |",
        "|---" * 4 + "|",
    ]
    lines += [_line([row[name] for name in ("network", "form", "kernels", "seconds")]) for row in record["first_steps"]]
    return "\n".join(lines) + "\n"


def _widest(at: list[Record], kind: str) -> str:
    """How many of the kernels have which widest access."""
    counts: dict[int, int] = defaultdict(int)
    for a in at:
        counts[max(map(int, a[kind]), default=0)] += 1
    return ", ".join(f"{bits} bits: {counts[bits]}" for bits in sorted(counts, reverse=True))


def _full(record: Record) -> str:
    targets = record["targets"]
    lines = [
        "## Every kernel\n",
        "Of each target: registers of a thread, warps on a multiprocessor, waves, widths of loads / of stores in bits"
        " (gfx: of the machine code, else of PTX), shared memory in bytes, spills if there are any; `SASS`: widths of"
        " LDG / STG, and float64 instructions of all instructions.\n",
        _line(["kernel", "case", "call", "tile", "warps", "programs", *targets]),
        "|---" * (6 + len(targets)) + "|",
    ]
    for row in record["kernels"]:
        tile = " ".join(f"{axis}={size}" for axis, size in row["tile"].items())
        cells = [row["kernel"], row["case"], row["call"], tile, row["warps"], row["programs"]]
        lines.append(_line([*cells, *(_cell(row[target]) for target in targets)]))
    return "\n".join(lines) + "\n"


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


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"

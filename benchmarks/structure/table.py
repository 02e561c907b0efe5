"""The records as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from benchmarks.markdown import table

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
    launches = sum(kernel["launches"] for kernel in kernels)
    head = HEAD.format(**record["versions"], count=len(kernels), launches=launches, latency=LATENCY * 1e6)
    parts = [head, _limits(record["targets"]), "## Summary\n", _summary(record)]
    if record.get("first_steps"):
        parts.append(_first_steps(record))
    return "\n".join([*parts, _full(record)])


def _limits(targets: list[str]) -> str:
    columns = ["target", "device", "multiprocessors", "GB/s", "warps", "blocks", "registers", "shared KiB"]
    lines = []
    for name in targets:
        of = TARGETS[name]
        cells = [name, of.device, of.multiprocessors, of.gigabytes_per_second, of.warps, of.blocks, of.registers]
        lines.append([*cells, of.shared >> 10, f"{bytes_to_keep_in_flight(name) / 1024:.0f}"])
    return table([*columns, "in flight KiB"], lines) + "\n"


def _summary(record: Record) -> str:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for kernel in record["kernels"]:
        for target in record["targets"]:
            groups[kernel["kernel"], target].append(kernel[target])
    columns = ["kernel", "target", "kernels", "registers", "spills", "least warps", "in flight KiB"]
    lines = []
    for (name, target), codes in sorted(groups.items()):
        registers = [code["registers"] for code in codes]
        warps = f"{min(code['resident_warps'] for code in codes)} of {TARGETS[target].warps}"
        in_flight = f"{min(code['in_flight_when_full'] for code in codes) / 1024:.0f}"
        spills = max(code["spills"] for code in codes)
        cells = [name, target, len(codes), f"{min(registers)} to {max(registers)}", spills, warps, in_flight]
        lines.append([*cells, *(_widest(codes, accesses) for accesses in ("loads", "stores"))])
    return table([*columns, "loads up to", "stores up to"], lines) + "\n"


def _widest(codes: list[Record], accesses: str) -> str:
    """How many of the kernels have which widest access."""
    counts = Counter(max(map(int, code[accesses]), default=0) for code in codes)
    return ", ".join(f"{bits} bits: {counts[bits]}" for bits in sorted(counts, reverse=True))


def _first_steps(record: Record) -> str:
    text = (
        "## The first training step\n\n"
        "Kernels that the activations of a network take, forward and backward, and the seconds until one process has"
        f" compiled them for {record['targets'][0]} with an empty cache.\n\n"
    )
    columns = ["network", "form", "kernels", "seconds"]
    return text + table(columns, ([step[name] for name in columns] for step in record["first_steps"])) + "\n"


def _full(record: Record) -> str:
    text = (
        "## Every kernel\n\n"
        "Of each target: registers of a thread, warps on a multiprocessor, waves, widths of loads / of stores in bits"
        " (gfx: of the machine code, else of PTX), shared memory in bytes, spills if there are any; `SASS`: widths of"
        " LDG / STG, and float64 instructions of all instructions.\n\n"
    )
    columns, lines = ["kernel", "case", "call", "tile", "warps", "programs"], []
    for kernel in record["kernels"]:
        tile = " ".join(f"{axis}={size}" for axis, size in kernel["tile"].items())
        cells = [tile if name == "tile" else kernel[name] for name in columns]
        lines.append([*cells, *(_cell(kernel[target]) for target in record["targets"])])
    return text + table([*columns, *record["targets"]], lines) + "\n"


def _cell(code: Record) -> str:
    parts = [f"{code['registers']} r", f"{code['resident_warps']} w", f"{code['waves']:.3g} waves", _widths(code)]
    if code["shared"]:
        parts.append(f"{code['shared']} B")
    if code["spills"]:
        parts.append(f"**spills {code['spills']}**")
    if "sass" in code:
        sass = code["sass"]
        parts.append(f"SASS {_widths(sass)}, {sass['float64']} of {sass['instructions']}")
    return "; ".join(parts)


def _widths(counted: Record) -> str:
    return " / ".join(" ".join(counted[accesses]) or "none" for accesses in ("loads", "stores"))

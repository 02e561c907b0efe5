"""Reading compiled kernels: registers, spills and widths of global accesses, from PTX, SASS and GCN assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Widths = dict[str, int]  # bits of an access: how many instructions


class Code(NamedTuple):
    """What one kernel's machine code asks for."""

    registers: int  # of a thread
    shared: int  # bytes of a block
    spills: int  # bytes of a thread that go to local memory and come back; registers on gfx
    loads: Widths  # of global memory
    stores: Widths
    occupancy: int | None  # warps of a partition as the compiler predicts it, where it does


def of_nvidia(ptx: str, cubin: bytes, shared: int) -> Code:
    """Read PTX and the binary that ptxas made of it."""
    usage = _tool("cuobjdump", cubin, "-res-usage")
    registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return Code(registers, shared, _ptxas_spills(ptx) if stack else 0, *ptx_widths(ptx), None)


def ptx_widths(ptx: str) -> tuple[Widths, Widths]:
    """Count loads and stores of global memory by width."""
    found: dict[str, Counter[str]] = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[a-zA-Z0-9:_]+?)*?(?:\.v([248]))?\.b(\d+)", ptx):
        found[kind][str(int(vector or 1) * int(bits))] += 1
    return _sorted(found["ld"]), _sorted(found["st"])


class Sass(NamedTuple):
    """What the instructions of a binary are."""

    instructions: int
    loads: Widths  # LDG, by width
    stores: Widths  # STG
    float64: int  # instructions of float64 arithmetic
    local: int  # loads and stores of local memory: spills
    barriers: int


def disassembled(cubin: bytes) -> Sass:
    """Count a binary's instructions by kind."""
    text = _tool("nvdisasm", cubin, "-c")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    found: dict[str, Counter[str]] = {"LDG": Counter(), "STG": Counter()}
    for kind, *parts in (opcode.split(".") for opcode in opcodes):
        if kind in found:
            width = next((p for p in parts if re.fullmatch(r"(U|S)?(8|16|64|128|256)", p)), "32")
            found[kind][width.lstrip("US")] += 1
    kinds = Counter(opcode.split(".")[0] for opcode in opcodes)
    float64, local = (sum(kinds[k] for k in of) for of in (("DADD", "DMUL", "DFMA", "DSETP"), ("LDL", "STL")))
    return Sass(len(opcodes), _sorted(found["LDG"]), _sorted(found["STG"]), float64, local, kinds["BAR"])


_GCN_BITS = {"ubyte": "8", "ushort": "16", "short": "16", "byte": "8", "dword": "32"}


def of_amd(asm: str, shared: int) -> Code:
    """Read GCN assembly, with the figures that LLVM writes below it."""

    def figure(name: str) -> int:
        return int(re.findall(rf"{name}:\s+(\d+)", asm)[0])

    spills = figure(r"\.vgpr_spill_count") + figure("; ScratchSize")
    found: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    pattern = r"^\s+(?:global|buffer|flat)_(load|store)_(ubyte|ushort|short|byte|dword)(?:_d16(?:_hi)?)?(?:x([234]))?\b"
    for kind, size, vector in re.findall(pattern, asm, re.MULTILINE):
        found[kind][str(int(_GCN_BITS[size]) * int(vector or 1))] += 1
    widths = _sorted(found["load"]), _sorted(found["store"])
    return Code(figure("; TotalNumVgprs"), shared, spills, *widths, figure("; Occupancy"))


def _sorted(widths: Counter[str]) -> Widths:
    return dict(sorted(widths.items(), key=lambda item: -int(item[0])))


def _tool(name: str, cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([TOOLS / name, option, path], capture_output=True, text=True, check=True).stdout


def _ptxas_spills(ptx: str) -> int:
    """Bytes that ptxas says it spills: a stack frame alone may be a division's call."""
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found
    arch = found[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        ptxas = TOOLS / ("ptxas-blackwell" if arch.startswith("sm_10") else "ptxas")
        command = [str(ptxas), f"-arch={arch}", "-v", str(path), "-o", str(Path(folder) / "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not spilled:
        raise RuntimeError(f"ptxas -v printed no spill counts: {log}")
    return sum(int(n) for n in spilled)

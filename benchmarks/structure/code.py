"""Reading compiled kernels: registers, spills and widths of global accesses, from PTX, SASS and GCN assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP")
GCN_BITS = {"ubyte": 8, "ushort": 16, "short": 16, "byte": 8, "dword": 32}
Widths = dict[str, int]  # bits of an access: how many instructions


class Code(NamedTuple):
    """What one kernel's machine code asks for."""

    registers: int  # of a thread
    shared: int  # bytes of a block
    spills: int  # bytes of a thread that go to local memory and come back; registers on gfx
    loads: Widths  # of global memory
    stores: Widths
    compiler_warps_of_partition: int | None = None  # occupancy as the compiler predicts it, where it does


class Sass(NamedTuple):
    """What the instructions of a binary are."""

    instructions: int
    loads: Widths  # LDG, by width
    stores: Widths  # STG
    float64: int  # instructions of float64 arithmetic


def of_nvidia(ptx: str, cubin: bytes, shared: int) -> Code:
    """Read PTX and the binary that ptxas made of it."""
    usage = _tool("cuobjdump", cubin, "-res-usage")
    registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    accesses = re.findall(r"\b(ld|st)\.global(?:\.[a-zA-Z0-9:_]+?)*?(?:\.v([248]))?\.b(\d+)", ptx)
    widths = _by_width(((access, int(vector or 1) * int(bits)) for access, vector, bits in accesses), "ld", "st")
    return Code(registers, shared, _ptxas_spills(ptx) if stack else 0, *widths)


def disassembled(cubin: bytes) -> Sass:
    """Count a binary's instructions."""
    text = _tool("nvdisasm", cubin, "-c")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    names = Counter(opcode.split(".")[0] for opcode in opcodes)
    accesses = []
    for name, *suffixes in (opcode.split(".") for opcode in opcodes):
        if name in ("LDG", "STG"):
            width = next((s for s in suffixes if re.fullmatch(r"(U|S)?(8|16|64|128|256)", s)), "32")
            accesses.append((name, int(width.lstrip("US"))))
    return Sass(len(opcodes), *_by_width(accesses, "LDG", "STG"), sum(names[name] for name in FLOAT64))


def of_amd(asm: str, shared: int) -> Code:
    """Read GCN assembly, with the figures that LLVM writes below it."""

    def figure(name: str) -> int:
        return int(re.findall(rf"{name}:\s+(\d+)", asm)[0])

    spills = figure(r"\.vgpr_spill_count") + figure("; ScratchSize")
    pattern = r"^\s+(?:global|buffer|flat)_(load|store)_(ubyte|ushort|short|byte|dword)(?:_d16(?:_hi)?)?(?:x([234]))?\b"
    accesses = re.findall(pattern, asm, re.MULTILINE)
    bits = ((access, GCN_BITS[size] * int(vector or 1)) for access, size, vector in accesses)
    return Code(figure("; TotalNumVgprs"), shared, spills, *_by_width(bits, "load", "store"), figure("; Occupancy"))


def _by_width(accesses: Iterable[tuple[str, int]], load: str, store: str) -> tuple[Widths, Widths]:
    """Count loads and stores by their bits, wide ones first."""
    counts = sorted(Counter(accesses).items(), key=lambda item: -item[0][1])
    loads, stores = ({str(bits): n for (access, bits), n in counts if access == name} for name in (load, store))
    return loads, stores


def _ptxas_spills(ptx: str) -> int:
    """Bytes that ptxas says it spills: a stack frame alone may be a division's call."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    ptxas = "ptxas-blackwell" if target[1].startswith("sm_10") else "ptxas"
    log = _tool(ptxas, ptx.encode(), f"-arch={target[1]}", "-v", "-o", "/dev/null")
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not spilled:
        raise RuntimeError(f"ptxas -v printed no spill counts: {log}")
    return sum(map(int, spilled))


def _tool(name: str, content: bytes, *options: str) -> str:
    """Return what a tool of CUDA prints of a file with that content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout

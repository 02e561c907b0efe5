"""Ahead-of-time compilation of launches, without a GPU: what the machine code of each kernel looks like."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vcl_kernels.backends.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Compiled(NamedTuple):
    """A compiled kernel's assembly, and the memory that each thread spills to (bytes; registers on gfx)."""

    asm: str
    spills: int


def compile_launch(launch: Launch, args: tuple[Any, ...], target: str) -> Compiled:
    """Compile the kernel as the JIT would specialise it for ``args``: tensors, ints, floats and None."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    names = launch.kernel.arg_names
    values = [*args, *(launch.constants[name] for name in names[len(args) :])]
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        if index >= len(args) or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp64"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=TARGETS[target], options={"num_warps": launch.warps})
    if target.startswith("sm"):
        return Compiled(built.asm["ptx"], _cuda_spills(built.asm["ptx"]))
    asm = built.asm["amdgcn"]
    spilled = re.findall(r"(?:\.vgpr_spill_count|; ScratchSize):\s+(\d+)", asm)
    assert spilled
    return Compiled(asm, sum(int(n) for n in spilled))


def _cuda_spills(ptx: str) -> int:
    """Bytes that ptxas says it spills (a stack frame alone may be a division's call)."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    ptxas = tools / ("ptxas-blackwell" if arch.startswith("sm_10") else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, f"-arch={arch}", "-v", path, "-o", Path(folder) / "kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert spilled, log
    return sum(int(n) for n in spilled)


def access_widths(compiled: Compiled) -> dict[str, set[int]]:
    """Return the widths in bits of global loads and stores in PTX."""
    widths: dict[str, set[int]] = {"ld": set(), "st": set()}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[a-z0-9:_]+?)*?(?:\.v([248]))?\.b(\d+)", compiled.asm):
        widths[kind].add(int(vector or 1) * int(bits))
    return widths

"""Compilation of a launch for a target, as the JIT would specialise it for its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.launches import Recorded

from .code import Code, Sass, disassembled, of_amd, of_nvidia

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Specialised(NamedTuple):
    """A kernel with all that its machine code depends on, but for the target; equal ones are compiled once."""

    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16, or tensors whose address is
    below_2gib: tuple[int, ...]  # tensors of a size that 32-bit offsets reach, which matters on AMD
    warps: int
    registers: int


def specialise(launch_and_args: Recorded) -> Specialised:
    """As the JIT does for tensors (of aligned addresses), ints, floats and None."""
    launch, args = launch_and_args
    signature: list[tuple[str, str]] = []
    constants: list[tuple[int, Any]] = []
    divisible, below_2gib = [], []
    names = launch.kernel.arg_names
    values = [*args, *(launch.constants[name] for name in names[len(args) :])]
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        run_time = launch.kernel.params[index].do_not_specialize
        if index >= len(args) or value is None or (isinstance(value, int) and value == 1 and not run_time):
            signature.append((name, "constexpr"))
            constants.append((index, value))
        elif isinstance(value, Tensor):
            signature.append((name, POINTERS[value.dtype]))
            divisible.append(index)
            if value.numel() * value.element_size() < 2**31:
                below_2gib.append(index)
        elif isinstance(value, float):
            signature.append((name, "fp64"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not run_time:
                divisible.append(index)
    kernel = launch.kernel.__name__
    return Specialised(
        kernel,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple(below_2gib),
        launch.warps,
        launch.most_registers,
    )


def build(kernel: Any, of: Specialised, target: str, sass: bool = False) -> tuple[Code, Sass | None]:
    """Compile and read; SASS costs half a second of disassembly."""
    nvidia = target.startswith("sm")
    attributes: dict[tuple[int, ...], list[list[Any]]] = {(i,): [["tt.divisibility", 16]] for i in of.divisible}
    if not nvidia:
        for i in of.below_2gib:
            attributes[(i,)].append(["tt.pointer_range", 32])
    constants = {(index,): value for index, value in of.constants}
    source = ASTSource(kernel, dict(of.signature), constants, attributes)
    backend = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    limit = {"maxnreg": of.registers} if nvidia else {}
    built = triton.compile(source, target=backend, options={"num_warps": of.warps, **limit})
    shared = built.metadata.shared
    if not nvidia:
        return of_amd(built.asm["amdgcn"], shared), None
    code = of_nvidia(built.asm["ptx"], built.asm["cubin"], shared)
    return code, disassembled(built.asm["cubin"]) if sass else None

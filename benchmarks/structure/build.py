"""Compilation of a launch for a target, as the JIT would specialise it for its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .code import Code, Sass, disassembled, of_amd, of_nvidia
from .launches import Recorded

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Specialised(NamedTuple):
    """A kernel with all that its machine code depends on, but for the target; equal ones are compiled once."""

    kernel: Any
    tensors: Any  # a NamedTuple of what each points to, or "constexpr" for None
    scalars: int  # how many
    sizes: tuple[tuple[str, str], ...]  # names and types
    constants: tuple[tuple[str, Any], ...]
    below_2gib: tuple[int, ...]  # tensors of a size that 32-bit offsets reach, which matters on AMD
    warps: int
    registers: int


def specialise(launched: Recorded) -> Specialised:
    """As the JIT does for tensors of aligned addresses, and for sizes, which it must not be specialised for."""
    launch, tensors, scalars = launched
    small = [index for index, t in enumerate(tensors) if t is not None and t.numel() * t.element_size() < 2**31]
    return Specialised(
        launch.kernel,
        type(tensors)(*("constexpr" if t is None else POINTERS[t.dtype] for t in tensors)),
        len(scalars),
        tuple((name, "i32" if size < 2**31 else "i64") for name, size in launch.sizes.items()),
        tuple(launch.constants.items()),
        tuple(small),
        launch.warps,
        launch.registers,
    )


def build(specialised: Specialised, target: str, sass: bool = False) -> tuple[Code, Sass | None]:
    """Compile and read; SASS costs half a second of disassembly."""
    kernel, tensors, scalars, sizes, named_constants, below_2gib, warps, registers = specialised
    nvidia, names = target.startswith("sm"), kernel.arg_names
    types = {**dict(sizes), **dict.fromkeys(dict(named_constants), "constexpr"), names[0]: tensors}
    types |= dict.fromkeys(names[1 : 1 + scalars], "fp64")
    constants: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in named_constants}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, pointer in enumerate(tensors):
        if pointer == "constexpr":
            constants[0, index] = None
        else:
            in_range = [["tt.pointer_range", 32]] if index in below_2gib and not nvidia else []
            attributes[0, index] = [["tt.divisibility", 16], *in_range]
    source = ASTSource(kernel, {name: types[name] for name in names}, constants, attributes)
    backend = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    limit = {"maxnreg": registers} if nvidia else {}
    built = triton.compile(source, target=backend, options={"num_warps": warps, **limit})
    shared = built.metadata.shared
    if not nvidia:
        return of_amd(built.asm["amdgcn"], shared), None
    code = of_nvidia(built.asm["ptx"], built.asm["cubin"], shared)
    return code, disassembled(built.asm["cubin"]) if sass else None

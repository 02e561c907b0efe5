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


CASES = [  # shape, channels_last, n, K, dtype, per activation, activation, whether P or C allow 128-bit accesses
    ((64, 64, 56, 56), False, 5, 2, torch.bfloat16, False, "elu", True),
    ((64, 64, 7, 7), False, 8, 8, torch.float32, False, "elu", False),
    ((64, 512, 14, 14), False, 8, 8, torch.float32, False, "relu", True),
    ((64, 256, 16, 16), False, 8, 8, torch.bfloat16, False, "gelu", True),
    ((64, 256, 16, 16), False, 8, 8, torch.float16, False, "silu", True),
    ((256, 8192), False, 8, 32, torch.float32, False, "gelu_tanh", True),
    ((256, 8192), False, 8, 32, torch.bfloat16, False, "relu", True),
    ((64, 64, 32, 32), True, 8, 8, torch.float32, False, "elu", True),
    ((250, 64, 8, 8), False, 5, 2, torch.float32, True, "elu", True),
    ((64, 64, 32, 32), False, 5, 2, torch.float32, False, "gelu", True),
    ((64, 64, 7, 7), False, 8, 8, torch.float64, False, "tanh", False),
    ((4096, 64), False, 4, 1024, torch.float32, False, "leaky_relu", True),
    ((64, 1024, 6, 6), True, 5, 2, torch.bfloat16, False, "relu", True),  # just fits on chip
    ((64, 1024, 8, 8), True, 8, 2, torch.float32, False, "relu", True),  # likewise
]


def launches(shape, channels_last, n, K, dtype, per_activation, activation):
    """Yield every launch of a shape with its arguments."""
    import triton.language as tl

    from vcl_kernels.backends.triton import apply, finalise, fused, moments, multiply
    from vcl_kernels.backends.triton.launch import arguments
    from vcl_kernels.geometry import Geometry
    from vcl_kernels.spec import ACTIVATIONS, Activation

    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    g = Geometry.of(x, n, K, per_activation)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    a = torch.empty(8, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta")
    wide = torch.empty(8, dtype=torch.float64, device="meta")
    for form in (0, 2):
        common = {"FORM": form, "BETA": 2, "ACC": acc}
        if fused.fits(g, x.element_size()):
            launch = fused.plan(g, g, x.element_size())
            launch.constants.update(common)
            yield launch, (x, x, a, a, a, 1.0, 0.0, 1.0, *arguments(g, g))
        for reduce in (False, True):
            launch = finalise.plan(g, reduce)
            if launch.constants["REDUCE"] == reduce:
                launch.constants.update(common)
                yield launch, (wide, a, None, a, a, a, a, 1.0, 0.0, 1.0, *finalise.arguments(g, 4))

    act = Activation(ACTIVATIONS.index(activation), 1.0)
    keep_rows = 2 * K * n <= shape[0]
    for kind, y, rows in ((-1, None, None), (act.kind, x, x if keep_rows else None)):
        launch, splits, per_split = moments.plan(g, None if y is None else g, x.element_size())
        launch.constants.update(ACTIVATION=kind, ACC=acc)
        yield launch, (x, y, rows, wide, 1.0, *arguments(g, g), splits * K * g.U, splits, per_split)

    launch = apply.plan(g, g, x.element_size())
    launch.constants.update(ACTIVATION=0, FROM_OUTPUT=False, ACC=acc)
    yield launch, (x, None, None, x, a, a, a, a, 1.0, *arguments(g, g))
    launch = apply.plan(g, g, x.element_size())
    from_output = keep_rows and act.from_output
    launch.constants.update(ACTIVATION=act.kind, FROM_OUTPUT=from_output, ACC=acc)
    yield launch, (x, x if from_output else None, x, x, a, a, None, a, 1.0, *arguments(g, g))

    launch = multiply.plan(x.numel())
    launch.constants.update(ACC=acc)
    yield launch, (x, a, x.numel())


def main() -> None:
    """Print a record of each kernel of each case for each target, as JSON."""
    import json

    records = []
    for *case, wide in CASES:
        for launch, args in launches(*case):
            for target in TARGETS:
                built = compile_launch(launch, args, target)
                widths = access_widths(built)
                records.append(
                    {
                        "kernel": launch.kernel.__name__,
                        "case": str(case),
                        "target": target,
                        "activation": launch.constants.get("ACTIVATION"),
                        "spills": built.spills,
                        "wide": wide,
                        "loads": sorted(widths["ld"]),
                        "stores": sorted(widths["st"]),
                    }
                )
    print(json.dumps(records))


if __name__ == "__main__":
    main()

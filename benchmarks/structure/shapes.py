"""What is compiled: cases, and for each the calls whose launches are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.cases import CONVNEXT, ELU_11, RESNET_50, VIT, Case
from vcl_kernels.options import ACTIVATIONS

from .launches import Recorded, activation_jobs, loss_jobs, moments_jobs, recorded, spec_of

EVERY_DTYPE = ("float32", "bfloat16", "float16")
MLP = [(N, C) for N in (128, 1024, 4096) for C in (64, 1024, 8192)]


class Look(NamedTuple):
    """A case and which calls on it."""

    case: Case
    forms: tuple[str, ...] = ("ratio", "relative_variance")
    unit: str = "channel"
    activations: tuple[str, ...] = ("elu",)
    moments: bool = False

    def __str__(self) -> str:
        return ", ".join([str(self.case), *(["per activation"] * (self.unit == "activation"))])


def every_look() -> list[Look]:
    """Shapes of the benchmark in float32, bfloat16 and float16, both layouts."""
    layouts = ("contiguous", "channels_last")
    found = []
    for dtype in EVERY_DTYPE:
        resnet = [(N, C, S, S) for N in (64, 256) for C, S in RESNET_50]
        found += [Look(Case(shape, layout, dtype)) for shape in resnet for layout in layouts]
        found += [Look(Case(shape, dtype=dtype), ("ratio", "variance")) for shape in ELU_11]
        found += [Look(Case(shape, dtype=dtype), ("ratio",), "activation") for shape in ELU_11]
        found += [Look(Case(shape, dtype=dtype), activations=("relu",)) for shape in MLP]
        found += [Look(Case(shape, "channels_last", dtype), activations=("gelu",)) for shape in CONVNEXT]
        found += [Look(Case(shape, "tokens", dtype), activations=("gelu",)) for shape in VIT]
        found += [Look(Case((64, 256, 56, 56), layout, dtype), activations=ACTIVATIONS) for layout in layouts]
        found += [Look(Case((64, 512, 28, 28), layout, dtype), moments=True) for layout in layouts]
    return found


def sample_looks() -> list[Look]:
    """A sample, for tests: every kernel, one pass and split, P odd and even, units wide and narrow."""
    both, ratio, every = ("ratio", "relative_variance"), ("ratio",), ("relative_variance",)
    return [
        Look(Case((64, 64, 56, 56), dtype="bfloat16"), ratio),
        Look(Case((64, 64, 7, 7)), every, activations=("tanh",)),
        Look(Case((64, 256, 16, 16), dtype="float16"), every, activations=("silu",)),
        Look(Case((256, 8192), dtype="bfloat16"), both, activations=("relu",)),
        Look(Case((64, 96, 56, 56), "channels_last"), every, moments=True),
        Look(Case((64, 768, 197), "tokens", "bfloat16"), every, activations=("gelu",)),
        Look(Case((250, 260, 8, 8)), ratio, "activation"),
        Look(Case((64, 512, 7, 7), dtype="bfloat16"), every, activations=("leaky_relu",)),
    ]


def every_dtype() -> list[Look]:
    """Every kernel in every dtype, for tests."""
    found = []
    for dtype in (*EVERY_DTYPE, "float64"):
        cases = [Case(shape, dtype=dtype) for shape in ((16, 8, 7, 7), (32, 72))]
        found += [Look(case, ("relative_variance",), activations=("gelu",)) for case in cases]
    return found


def launches(look: Look) -> Iterator[tuple[str, Recorded]]:
    """Yield each launch after the call that makes it."""
    x = look.case.tensor("meta")
    for form in look.forms:
        spec = spec_of(x, form, look.unit)
        jobs = loss_jobs(x, spec)
        for name in look.activations:
            jobs |= activation_jobs(x, spec, name)
        if look.moments:
            jobs |= moments_jobs(x, spec)
        for call, job in jobs.items():
            yield from ((f"{form}: {call}", found) for found in recorded(job))

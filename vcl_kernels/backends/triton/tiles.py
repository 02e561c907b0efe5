"""What kernels share: how they see a tensor, where a tile's values lie, and how moments are merged.

A kernel sees rows of runs. A run is what a block of UB neighbouring units has in one row, one value after another.
There are three kinds:

- "alone": the positions of one unit (spatial layout), of which a tile takes FB;
- "shared": the positions of several units, one unit after another (spatial layout, few positions);
- "units": one value of each unit (unit layout). Each value of a unit then takes the place of a row, and P is 1.

A tile is [row, element of the run]. What it has of one element is a column.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ...geometry import Geometry
from .launch import power_of_2

SHRUNK = tl.constexpr(2.0**-80)  # so that squares of the largest values of float32 are within its range


class Tile(NamedTuple):
    """What a kernel is specialised for: the kind of its runs, and a tile [NB, FB] of NB · MB rows."""

    run_kind: str
    aligned: int  # the power of two, 16 at most, by which all distances were divided
    even: bool  # rows lie one distance apart; else those of each sample of x do
    NB: int
    UB: int  # 0: known at run time
    FB: int
    MB: int = 1  # rows side by side, of UB columns each


@triton.jit
def row_at(row, Q, x_sample, x_row, T: tl.constexpr):
    """Where a row of x lies, counted from row 0 of its sub-batch. The Q rows of a sample are x_row apart."""
    if T.even:
        return row.to(tl.int64) * x_row * T.aligned
    else:
        sample = row // Q
        return (sample.to(tl.int64) * x_sample + (row - sample * Q).to(tl.int64) * x_row) * T.aligned


@triton.jit
def run_length(block, U, P, UB, T: tl.constexpr):
    """Elements of a run: fewer in the last block. The compiler is told that T.aligned divides it."""
    return tl.minimum(U - block * UB, UB) * P // T.aligned * T.aligned


@triton.jit
def by_unit(a, P, KB: tl.constexpr, T: tl.constexpr):
    """Elements of KB runs [KB · FB] as [KB, position, UB]. Where there are fewer positions, the last is repeated.

    In one dimension elements are gathered through shared memory. In two, Triton would shuffle each with each.
    """
    if T.run_kind == "shared":
        e = tl.arange(0, KB * T.FB)
        index = e // T.FB * T.FB + e % T.UB * P + tl.minimum(e % T.FB // T.UB, P - 1)
        a = tl.gather(a, index, 0)
    return tl.reshape(a, [KB, T.FB // T.UB, T.UB])


@triton.jit
def unit_in_run(f, P, T: tl.constexpr):
    """Which unit of a run an element belongs to: for shared runs f // P, by a multiplication: both are below 1024."""
    if T.run_kind == "shared":
        return f * ((1 << 20) // P + 1) >> 20
    else:
        return f % (T.FB // T.MB) if T.run_kind == "units" else tl.arange(0, 1)


@triton.jit
def chan_merge(mean, m2, count, values, AXIS: tl.constexpr, ACC: tl.constexpr):
    """Mean and m2 of all moments along ``AXIS``, of ``count`` values each and of ``values`` in all (Chan et al.).

    Where all means are equal, the result is that mean: sums of float32 are exact here, sums of float64 are corrected.
    """
    count = count.to(tl.float64)
    centre = tl.sum(count * mean, AXIS, keep_dims=True) / values
    d = mean - centre
    if tl.float64 == ACC:
        error = tl.sum(count * d, AXIS, keep_dims=True) / values
        centre += error
        d -= error
    return tl.sum(centre, AXIS), tl.sum(m2.to(tl.float64) + count * (d * d), AXIS)


def run_tile(x: Geometry, most: int, shared: int, alone: int) -> tuple[int, int]:
    """Return UB and FB for the spatial layout: how many units share a run, and elements of a tile.

    Units of up to ``most`` positions share a tile of about ``shared`` elements. A tile of another has up to ``alone``.
    """
    PB = power_of_2(x.P)
    if x.unit_stride == x.P <= most:
        UB = min(power_of_2(x.U), max(1, shared // PB))
        return UB, UB * PB
    return 1, min(alone, PB)


def as_runs(x: Geometry, tile: dict[str, int], most: int = 16) -> tuple[Tile, dict[str, int]]:
    """Return what a kernel is specialised for, and sizes of x and distances in x and in dense rows, given at run time.

    Distances are in units of their alignment, ``most`` at most: 16 is all that an access can use.
    """
    UB, MB = tile["UB"], tile.get("MB", 1)
    FB = tile.get("FB", MB * UB)
    if x.spatial:
        run_kind, even = "shared" if UB > 1 else "alone", True
        sizes = {"N": x.N, "K": x.K, "n": x.n, "U": x.U, "P": x.P, "Q": 1}
        rows, steps = (x.row_stride, x.row_stride), (UB * x.unit_stride, x.U * x.P, UB * x.P)
    else:
        run_kind, even = "units", x.P == 1 or x.row_stride == x.P * x.pos_stride
        sizes = {"N": x.N * x.P, "K": x.K, "n": x.M, "U": x.U, "P": 1, "Q": x.P}
        rows, steps = (x.row_stride, x.row_stride if x.P == 1 else x.pos_stride), (UB, x.U, UB)
    distances = (x.n * x.row_stride, *rows, *steps)
    by = math.gcd(most, *distances)
    names = ("x_sub_batch", "x_sample", "x_row", "x_run", "to_row", "to_run")
    sizes |= {name: distance // by for name, distance in zip(names, distances, strict=True)}
    return Tile(run_kind, by, even, tile["NB"], UB, FB, MB), sizes

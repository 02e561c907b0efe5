"""Runs: what neighbouring units have of a row, one element after another, where a unit's positions are contiguous.

Small planes (7 x 7) begin anywhere; runs of several begin where wide accesses may.
"""

import triton
import triton.language as tl

from ...geometry import Geometry
from .launch import fitting, power_of_2


@triton.jit
def run_length(group, U, P, UB, ALIGNED: tl.constexpr):
    """Elements of a run: fewer in the last group of units. The compiler is told that ALIGNED divides it."""
    return tl.minimum(U - group * UB, UB) * P // ALIGNED * ALIGNED


@triton.jit
def by_unit(a, P, KB: tl.constexpr, UB: tl.constexpr, FB: tl.constexpr):
    """[KB, FB // UB, UB] of the elements of KB runs [KB · FB]: those of a unit, then its last again, are a column.

    Of one dimension, elements go through shared memory. Of two, Triton would shuffle each with each.
    """
    if UB == 1:
        return tl.reshape(a, [KB, FB, 1])
    else:
        e = tl.arange(0, KB * FB)
        index = e // FB * FB + e % UB * P + tl.minimum(e % FB // UB, P - 1)
        return tl.reshape(tl.gather(a, index, 0), [KB, FB // UB, UB])


@triton.jit
def of_unit(a, k, unit, KB: tl.constexpr, UB: tl.constexpr, FB: tl.constexpr):
    """[KB · FB] of values of units [KB, UB]: that of run k and of the unit that each element belongs to."""
    if UB == 1:
        return tl.reshape(tl.broadcast_to(a, [KB, FB]), [KB * FB])
    else:
        return tl.gather(tl.reshape(a, [KB * UB]), k * UB + unit, 0)


@triton.jit
def unit_in_run(f, P):
    """Which unit of a run an element belongs to: f // P, for f and P below 1024, by a multiplication."""
    return f * ((1 << 20) // P + 1) >> 20


def run_tile(x: Geometry, most: int, shared: int, alone: tuple[int, int]) -> tuple[int, int]:
    """Return UB and FB: how many units share a run, and elements of a tile.

    Units of ``most`` positions at most share a tile of about ``shared`` elements. A tile of another has from
    ``alone[0]`` to ``alone[1]``.
    """
    if x.unit_stride == x.P <= most:
        PB = power_of_2(x.P)
        UB = min(power_of_2(x.U), max(1, shared // PB))
        return UB, UB * PB
    return 1, fitting(x.P, *alone)


def run_steps(x: Geometry, UB: int) -> tuple[int, int, int, int]:
    """Return distances of rows and of runs, in x and in dense rows."""
    return x.row_stride, UB * x.unit_stride, x.U * x.P, UB * x.P


def value_steps(x: Geometry) -> tuple[int, int, int]:
    """Return distances where units are contiguous: of rows and of positions in x, and of positions in dense rows."""
    return x.row_stride, x.row_stride if x.P == 1 else x.pos_stride, x.U

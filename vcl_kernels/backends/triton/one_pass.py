"""Loss and gradient in one pass: a unit's K·M values are read once, stay on chip, and are written as dx."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry
from .forms import Beta, loss_and_scale
from .launch import RUN_TIME, Launch, cdiv, power_of_2, warps_for
from .tiles import SHRUNK, as_runs, by_unit, chan_merge, row_at, run_length, run_tile, unit_in_run

# Most elements of a tile, padding included: 64 in each thread of 8 warps; in the unit layout, where addresses take
# registers too, 16 in each thread of 16 warps. More would spill.
MOST_SPATIAL = 16384
MOST_UNIT = 8192


class Tensors(NamedTuple):
    """What ``one_pass`` reads and writes."""

    x: Tensor
    dx: Tensor
    loss: Tensor  # of each unit
    dbeta: Tensor | None
    beta: Tensor | None


@triton.jit(do_not_specialize=RUN_TIME)
def one_pass(  # noqa: PLR0913
    tensors, beta_value: tl.float64, beta_min: tl.float64, factor: tl.float64,
    N, K, n, U, P, Q, x_sub_batch, x_sample, x_row, x_run, to_row, to_run,
    FORM: tl.constexpr, BETA: tl.constexpr, ACC: tl.constexpr, KB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program: all values of the units of a run.

    The tile is [row, sub-batch · element of the run], so that a thread has whole columns: with three dimensions Triton
    3.6 would spread rows over threads. In the unit layout, where units are few, it is [sub-batch, row, unit].
    """
    U = to_row.to(tl.int64) * T.aligned if T.run_kind == "units" else U  # so the compiler knows a divisor of U
    block = tl.program_id(0).to(tl.int64)
    units = block * T.UB + tl.arange(0, T.UB)
    length = run_length(block, U, P, T.UB, T)
    if T.run_kind == "units":
        k, i = tl.arange(0, KB)[:, None, None], tl.arange(0, T.NB)[None, :, None]
        f = tl.arange(0, T.UB)[None, None, :]
        of_run = f
    else:
        e = tl.arange(0, KB * T.FB)
        k, f, i = (e // T.FB)[None, :], (e % T.FB)[None, :], tl.arange(0, T.NB)[:, None]
        of_run = tl.arange(0, T.FB)[None, :]
    mask = (i < n) & ((k < K) & (f < length))
    at = (block * x_run + k.to(tl.int64) * x_sub_batch) * T.aligned + f
    x = tl.load(tensors.x + at + row_at(i, Q, x_sample, x_row, T), mask=mask, other=0.0).to(ACC)
    if T.run_kind == "units":
        d, m2 = deviations(x, mask, n)
    else:
        unit = e // T.FB * T.UB + tl.minimum(unit_in_run(e % T.FB, P, T), T.UB - 1)
        d, m2 = deviations_of_runs(x, i, n, P, unit, KB, ACC, T)
    beta = Beta(tensors.beta, beta_value, beta_min, factor)
    loss, scale, dbeta = loss_and_scale(m2, K, n * P, units, U, beta, FORM, BETA, ACC)
    tl.store(tensors.loss + units, loss, mask=units < U)
    if tensors.dbeta is not None:
        tl.store(tensors.dbeta + units, dbeta, mask=units < U)
    scale = scale[:, None, :] if T.run_kind == "units" else to_columns(scale, unit, KB, T)[None, :]
    dx_at = tensors.dx + block * to_run * T.aligned
    row = (k * n + i).to(tl.int64)
    tl.store(dx_at + row * to_row * T.aligned + f, (scale * d).to(tensors.dx.dtype.element_ty), mask=mask)
    zeros = tl.zeros_like(i + of_run).to(tensors.dx.dtype.element_ty)
    for start in range(K * n, N, T.NB):  # rows that take no part
        past = (start + i).to(tl.int64)
        tl.store(dx_at + past * to_row * T.aligned + of_run, zeros, mask=(past < N) & (of_run < length))


@triton.jit
def deviations(x, mask, n):
    """x - mean along axis 1, and m2."""
    mean = quotient(tl.sum(x, 1), n)
    d = tl.where(mask, x - mean[:, None, :], 0.0)
    error = quotient(tl.sum(d, 1), n)  # the rounding of the mean
    d = tl.where(mask, d - error[:, None, :], 0.0)
    return d, sum_of_squares(d, 1)


@triton.jit
def deviations_of_runs(x, i, n, P, unit, KB: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr):
    """x - mean of each unit, and m2 [KB, UB], merged from the moments of columns.

    A column's first value is subtracted from all others: |mean| >> std costs nothing.
    """
    p = tl.arange(0, T.FB // T.UB)[None, :, None]
    first = first_row(x, i)
    d = tl.where(i < n, x - first[None, :], 0.0)
    column_mean = tl.sum(d, 0) * (1.0 / n.to(ACC))
    m2 = sum_of_squares(tl.where(i < n, d - column_mean[None, :], 0.0), 0)
    mean = by_unit(first.to(tl.float64) + column_mean.to(tl.float64), P, KB, T)
    m2 = tl.where(p < P, by_unit(m2, P, KB, T), 0.0)
    mean, m2 = chan_merge(mean, m2, tl.where(p < P, n, 0), (n * P).to(tl.float64), 1, ACC)
    rounded = mean.to(ACC)
    error = to_columns((mean - rounded.to(tl.float64)).to(ACC), unit, KB, T)
    return x - to_columns(rounded, unit, KB, T)[None, :] - error[None, :], m2


@triton.jit
def to_columns(a, unit, KB: tl.constexpr, T: tl.constexpr):
    """[KB · FB] of values of units [KB, UB]: for each column that of its sub-batch and unit."""
    if T.run_kind == "shared":
        return tl.gather(tl.reshape(a, [KB * T.UB]), unit, 0)
    else:
        return tl.reshape(tl.broadcast_to(a, [KB, T.FB]), [KB * T.FB])


@triton.jit
def first_row(x, i):
    """Row 0 of x [NB, KB · FB], by its bits: adding zeros to those costs nothing where a thread has all rows."""
    bits = tl.int64 if x.dtype == tl.float64 else tl.int32
    return tl.sum(tl.where(i == 0, x.to(bits, bitcast=True), 0), 0).to(bits).to(x.dtype, bitcast=True)


@triton.jit
def sum_of_squares(d, AXIS: tl.constexpr):
    """Σ d² along ``AXIS``, in float64, also where squares are past float32's range."""
    squares = tl.sum(d * d, AXIS).to(tl.float64)
    if d.dtype == tl.float32:  # noqa: SIM102  # known to the compiler, the other not
        if tl.max(squares) == float("inf"):
            less = d * SHRUNK
            of_less = tl.sum(less * less, AXIS).to(tl.float64) * (1.0 / (SHRUNK * SHRUNK))
            squares = tl.where(squares < float("inf"), squares, of_less)
    return squares


@triton.jit
def quotient(total, n):
    """Total / n, to nearest, which a GPU's usual division in float32 is not: equal values have deviations of 0."""
    if total.dtype == tl.float64:
        return total / n
    else:  # what follows a return is compiled too
        return tl.div_rn(total, n.to(tl.float32))


def padded_unit(x: Geometry) -> int:
    """Return how many elements of a tile one unit takes."""
    return power_of_2(x.K) * (power_of_2(x.n) * power_of_2(x.P) if x.spatial else power_of_2(x.M))


def fits(x: Geometry, itemsize: int) -> bool:
    """Whether a unit, or 32 bytes of contiguous units, fits on chip."""
    if x.spatial:  # with an odd P accesses are narrow, and their addresses take as many registers again
        return padded_unit(x) <= (MOST_SPATIAL // 2 if x.P % 2 else MOST_SPATIAL)
    return padded_unit(x) * min(32 // itemsize, power_of_2(x.U)) <= MOST_UNIT


@functools.lru_cache(maxsize=1024)
def plan(x: Geometry, itemsize: int) -> Launch:
    """Decide the launch for a unit that fits: UB and warps. The other axes of a tile hold all of a unit."""
    elements, KB = padded_unit(x), power_of_2(x.K)
    if x.spatial:
        UB, _ = run_tile(x, 256, min(512, MOST_SPATIAL // elements * power_of_2(x.P)), 1)
        warps = max(1 if UB == 1 else 2, min(8, warps_for(elements * UB)))
        tile = {"NB": power_of_2(x.n), "KB": KB, "UB": UB, "FB": UB * power_of_2(x.P)}
    else:
        # [KB, UB] values of the loss are float64: there are more warps than x needs, so that a thread has few of them
        UB = min(power_of_2(x.U), max(32 // itemsize, min(128, 8192 // elements, 256 // KB)))
        warps = max(4, min(16, KB * UB // min(16 * itemsize, 64)), warps_for(elements * UB))
        tile = {"NB": power_of_2(x.M), "KB": KB, "UB": UB}
    T, sizes = as_runs(x, tile)
    return Launch(one_pass, (cdiv(x.U, UB),), sizes, {"T": T, "KB": KB}, tile, warps, 255 if x.spatial else 128)

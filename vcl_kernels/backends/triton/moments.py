"""Moments of sub-batches, and of parts of those that take too long for one program, for finalise to merge.

With an activation, the same pass over x also writes y, for all rows, and keeps the rows that take part.
"""

import functools
import math
from typing import Any

import triton
import triton.language as tl

from ...geometry import Geometry
from .activations import activate
from .launch import RUN_TIME, Launch, Settings, cdiv, dense_units, fitting, positions_constant, power_of_2, warps_for

TILE = 2048
FEW = 256  # values of a unit in a sub-batch at most whose errors do not average out: one tile, squares in float64
PROGRAMS = 1024  # wanted at least: several for each of a GPU's multiprocessors


@triton.jit(do_not_specialize=RUN_TIME)
def moments_spatial(
    x_ptr,
    y_ptr,
    rows_ptr,
    partial_ptr,
    mean_ptr,
    parameter: "fp64",  # noqa: F821
    N,
    K,
    n,
    U,
    P_run_time,
    x_row,
    x_unit,
    y_row,
    y_unit,
    plane,
    splits,
    tiles_per_split,
    P_CONSTANT: tl.constexpr,
    X_DENSE: tl.constexpr,
    Y_DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,  # or None: moments alone
    ACC: tl.constexpr,
    SQUARES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    NB: tl.constexpr,
    UB: tl.constexpr,
    PB: tl.constexpr,
):
    """Program (units, sub-batch, split): tiles [row, unit, position], whose elements each follow their own moments.

    They are merged at the end. With an activation, programs after those do a tile each of the rows past the last
    sub-batch.
    """
    GROUP: tl.constexpr = PB // 4 if PB > 4 else PB  # squares summed in SQUARES; sums of groups in float64
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    P = P_CONSTANT if P_CONSTANT else P_run_time
    x_step = P if X_DENSE else x_unit
    y_step = P if Y_DENSE else y_unit
    i = tl.arange(0, NB)[:, None, None]
    u = tl.arange(0, UB)[None, :, None]
    p = tl.arange(0, PB)[None, None, :]
    x_u = u * P if X_DENSE else u.to(tl.int64) * x_unit  # a distance between channels may be large
    y_u = u * P if Y_DENSE else u.to(tl.int64) * y_unit
    by_pos = tl.cdiv(P, PB)
    blocks = tl.cdiv(U, UB)
    pid = tl.program_id(0)
    if pid < blocks * K * splits:
        split = pid % splits
        k = pid // splits % K
        first = (pid // splits // K).to(tl.int64) * UB
        units = first + tl.arange(0, UB)
        by_row = tl.cdiv(n, NB)
        begin = split * tiles_per_split
        end = tl.minimum(begin + tiles_per_split, by_row * by_pos)
        # one value of each sub-batch is taken off first: |mean| >> std costs nothing
        pilot_at = x_ptr + (k * n).to(tl.int64) * x_row + units * x_step
        pilot = tl.load(pilot_at, mask=units < U, other=0.0).to(ACC)
        mean = tl.zeros([NB, UB, PB], ACC)
        m2 = tl.zeros([NB, UB, PB], ACC)
        for t in range(begin, begin + 1 if ONE_TILE else end):
            sample = t % by_row * NB + i
            position = t // by_row * PB + p
            mask = (sample < n) & (first + u < U) & (position < P)
            row = (k * n + sample).to(tl.int64)
            given = tl.load(x_ptr + first * x_step + row * x_row + (x_u + position), mask=mask, other=0.0)
            if ACTIVATION is not None:
                y = activate(given.to(ACC), parameter, ACTIVATION, HALF).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + first * y_step + row * y_row + (y_u + position), y, mask=mask)
            if rows_ptr is not None:
                tl.store(rows_ptr + first * P + row * U * P + (u * P + position), given, mask=mask)
            mean, m2 = followed(mean, m2, given.to(ACC) - pilot[None, :, None], mask, t - begin, ONE_TILE)
        # an element's tiles are the first of all: it has several rows, or several positions, never both
        its_tiles = tl.cdiv(n - i, NB) * tl.cdiv(P - p, PB)
        count = tl.maximum(tl.minimum(its_tiles, end) - begin, 0).to(ACC)
        total = tl.sum(tl.sum(count, 2), 0)
        centre = tl.sum(tl.sum(count * mean, 2), 0) / total
        d = mean - centre[None, :, None]
        error = tl.sum(tl.sum(count * d, 2), 0) / total
        squares = spread_out(m2, d, error[None, :, None], count, SQUARES, ONE_TILE)
        groups = tl.reshape(squares, [NB, UB, PB // GROUP, GROUP])
        spread = tl.sum(tl.sum(tl.sum(groups, 3).to(tl.float64), 2), 0)
        at = (split.to(tl.int64) * K + k) * U + units
        store_moments(partial_ptr, mean_ptr, at, plane, units < U, centre + error, spread, pilot, WHOLE)
        if not WHOLE and pid < splits:  # the same for every unit and sub-batch
            tl.store(partial_ptr + 3 * plane + split + tl.arange(0, 1), total)
    elif ACTIVATION is not None:
        t = pid - blocks * K * splits
        position = t % by_pos * PB + p
        first = (t // by_pos % blocks).to(tl.int64) * UB
        row = K * n + (t // by_pos // blocks).to(tl.int64) * NB + i
        mask = (row < N) & (first + u < U) & (position < P)
        x = tl.load(x_ptr + first * x_step + row * x_row + (x_u + position), mask=mask, other=0.0).to(ACC)
        y = activate(x, parameter, ACTIVATION, HALF).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + first * y_step + row * y_row + (y_u + position), y, mask=mask)


@triton.jit(do_not_specialize=RUN_TIME)
def moments_unit(
    x_ptr,
    y_ptr,
    rows_ptr,
    partial_ptr,
    mean_ptr,
    parameter: "fp64",  # noqa: F821
    N,
    K,
    n,
    U,
    P,
    x_row,
    x_pos,
    y_row,
    y_pos,
    plane,
    splits,
    tiles_per_split,
    ACTIVATION: tl.constexpr,  # or None: moments alone
    ACC: tl.constexpr,
    SQUARES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program (units, sub-batch, split): likewise with tiles [value, unit]."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    m = tl.arange(0, MB)[:, None]
    blocks = tl.cdiv(U, UB)
    pid = tl.program_id(0)
    if pid < blocks * K * splits:
        split = pid % splits
        k = pid // splits % K
        units = (pid // splits // K).to(tl.int64) * UB + tl.arange(0, UB)
        u = units[None, :]
        M = n * P
        begin = split * tiles_per_split
        end = tl.minimum(begin + tiles_per_split, tl.cdiv(M, MB))
        # one value of each sub-batch is taken off first: |mean| >> std costs nothing
        pilot_at = x_ptr + (k * n).to(tl.int64) * x_row + units
        pilot = tl.load(pilot_at, mask=units < U, other=0.0).to(ACC)
        mean = tl.zeros([MB, UB], ACC)
        m2 = tl.zeros([MB, UB], ACC)
        for t in range(begin, begin + 1 if ONE_TILE else end):
            value = t * MB + m
            mask = (value < M) & (u < U)
            row = (k * n + value // P).to(tl.int64)
            position = (value % P).to(tl.int64)
            given = tl.load(x_ptr + row * x_row + position * x_pos + u, mask=mask, other=0.0)
            if ACTIVATION is not None:
                y = activate(given.to(ACC), parameter, ACTIVATION, HALF).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + row * y_row + position * y_pos + u, y, mask=mask)
            if rows_ptr is not None:
                tl.store(rows_ptr + (row * P + position) * U + u, given, mask=mask)
            mean, m2 = followed(mean, m2, given.to(ACC) - pilot[None, :], mask, t - begin, ONE_TILE)
        count = tl.maximum(tl.minimum(tl.cdiv(M - m, MB), end) - begin, 0).to(ACC)
        total = tl.sum(count, 0)
        centre = tl.sum(count * mean, 0) / total
        d = mean - centre[None, :]
        error = tl.sum(count * d, 0) / total
        squares = spread_out(m2, d, error[None, :], count, SQUARES, ONE_TILE)
        spread = tl.sum(squares.to(tl.float64), 0)
        at = (split.to(tl.int64) * K + k) * U + units
        store_moments(partial_ptr, mean_ptr, at, plane, units < U, centre + error, spread, pilot, WHOLE)
        if not WHOLE and pid < splits:  # the same for every unit and sub-batch
            tl.store(partial_ptr + 3 * plane + split + tl.arange(0, 1), total)
    elif ACTIVATION is not None:
        t = pid - blocks * K * splits
        u = (t % blocks).to(tl.int64) * UB + tl.arange(0, UB)[None, :]
        start = (t // blocks).to(tl.int64) * MB
        value = (start % P).to(tl.int32) + m  # counted from the start of a row: a 32-bit division
        row = K * n + start // P + value // P
        position = (value % P).to(tl.int64)
        mask = (row < N) & (u < U)
        x = tl.load(x_ptr + row * x_row + position * x_pos + u, mask=mask, other=0.0).to(ACC)
        y = activate(x, parameter, ACTIVATION, HALF).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * y_row + position * y_pos + u, y, mask=mask)


@triton.jit
def followed(mean, m2, d, mask, before, ONE_TILE: tl.constexpr):
    """Welford's update by d of elements that have seen ``before`` values each, where mask."""
    if ONE_TILE:
        return tl.where(mask, d, 0.0), m2
    delta = tl.where(mask, d - mean, 0.0)
    mean += delta * (1.0 / (before + 1).to(d.dtype))
    return mean, m2 + delta * (d - mean)


@triton.jit
def spread_out(m2, d, error, count, SQUARES: tl.constexpr, ONE_TILE: tl.constexpr):
    """Σ (x - mean)² of what each element followed: m2 about its own mean, which is d - error from the mean of all."""
    d = d.to(SQUARES) - error.to(SQUARES)
    if ONE_TILE:
        d = tl.where(count > 0, d, 0.0)
        return d * d
    return m2 + count * (d * d)


@triton.jit
def store_moments(partial_ptr, mean_ptr, at, plane, valid, mean, m2, pilot, WHOLE: tl.constexpr):
    """Store mean and m2 of a whole sub-batch; of a part of it mean - pilot, m2 and pilot, in three planes."""
    if WHOLE:
        if mean_ptr is not None:
            mean = pilot.to(tl.float64) + mean
            tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), mask=valid)
        tl.store(partial_ptr + at, m2, mask=valid)
    else:
        tl.store(partial_ptr + at, mean, mask=valid)
        tl.store(partial_ptr + at + plane, m2, mask=valid)
        tl.store(partial_ptr + at + 2 * plane, pilot, mask=valid)


@functools.lru_cache(maxsize=1024)
def rule(x: Geometry, writes: bool, itemsize: int) -> Settings:
    """Choose settings: a thread has 16 elements; 8 where addresses take registers too.

    Those of an odd P do, and of values of two bytes that are written by unit.
    """
    most = TILE if writes or itemsize > 2 else 2 * TILE
    if x.spatial:
        PB = fitting(x.P, most)
        NB = min(power_of_2(x.n), most // PB) if PB >= x.P else 1
        tile = {"NB": NB, "UB": min(power_of_2(x.U), most // (NB * PB)), "PB": PB}
    elif x.M <= FEW:
        UB = min(power_of_2(x.U), 256 // itemsize, max(32 // itemsize, most // power_of_2(x.M)))
        tile = {"MB": power_of_2(x.M), "UB": UB}
    else:
        UB = min(power_of_2(x.U), 64)
        tile = {"MB": min(power_of_2(x.M), most // UB), "UB": UB}
    splits = max(1, PROGRAMS // (cdiv(x.U, tile["UB"]) * x.K))
    addresses = x.P % 2 if x.spatial else writes and itemsize == 2
    return Settings(tile, warps_for(math.prod(tile.values()) * (4 if addresses else 2)), splits)


def squares_in_float64(x: Geometry, itemsize: int) -> bool:
    """Whether a sub-batch has so few values of a unit that their rounding errors do not average out."""
    return itemsize == 8 or x.M <= FEW


def plan(
    x: Geometry, y: Geometry | None, itemsize: int, settings: Settings | None = None, *, keep_rows: bool = False
) -> tuple[Launch, int, int]:
    """Decide the launch, for moments (and the rows) alone if y is None; also return splits and tiles in each."""
    tile, warps, splits = settings or rule(x, y is not None or keep_rows, itemsize)
    rest = 0 if y is None else x.N - x.K * x.n
    constants: dict[str, Any] = dict(tile)
    if x.spatial:
        by_pos = cdiv(x.P, tile["PB"])
        if by_pos > 1 < tile["NB"]:
            raise ValueError(f"a tile of several rows must span all {x.P} positions; got {tile}")
        tiles, rest_tiles = cdiv(x.n, tile["NB"]) * by_pos, cdiv(rest, tile["NB"]) * by_pos
        kernel = moments_spatial
        constants |= {
            "P_CONSTANT": positions_constant(x.P),
            "X_DENSE": dense_units(x),
            "Y_DENSE": dense_units(y or x),
        }
    else:
        tiles, rest_tiles = cdiv(x.M, tile["MB"]), cdiv(rest * x.P, tile["MB"])
        kernel = moments_unit
    per_split = cdiv(tiles, min(tiles, splits))
    splits = cdiv(tiles, per_split)
    constants |= {
        "SQUARES": tl.float64 if squares_in_float64(x, itemsize) else tl.float32,
        "ONE_TILE": per_split == 1,
        "WHOLE": splits == 1,
    }
    grid = (cdiv(x.U, tile["UB"]) * (x.K * splits + rest_tiles),)
    return Launch(kernel, grid, constants, warps), splits, per_split

"""Moments of sub-batches that do not fit on chip: partial samples over many programs, merged in a fixed order.

With an activation, the same pass over x also writes y, for all rows, and keeps the rows that take part.
"""

import math
from typing import Any

import triton
import triton.language as tl

from ...geometry import Geometry
from .activations import NO_ACTIVATION, activate
from .formulas import merge_moments
from .launch import Launch, Settings, cdiv, dense_units, positions_constant, power_of_2, warps_for

TILE = 2048
FEW = 256  # values of a unit in a sub-batch, at most, whose rounding errors do not average out: squares are float64
PROGRAMS = 1024  # wanted at least: several for each of a GPU's multiprocessors


@triton.jit
def moments_spatial(
    x_ptr,
    y_ptr,
    rows_ptr,
    partial_ptr,
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
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    SQUARES: tl.constexpr,
    NB: tl.constexpr,
    UB: tl.constexpr,
    PB: tl.constexpr,
):
    """Program (units, sub-batch, split) merges its tiles into count, mean - pilot, m2, pilot.

    With an activation, programs after those do a tile each of the rows past the last sub-batch.
    """
    GROUP: tl.constexpr = PB // 4 if PB > 4 else PB  # squares summed in SQUARES; sums of groups in float64
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
        count = tl.full([], 0.0, ACC)  # the same for every unit
        mean = tl.zeros([UB], ACC)
        m2 = tl.zeros([UB], tl.float64)
        units = first + tl.arange(0, UB)
        # one value of each sample is taken off first: |mean| >> std costs nothing
        pilot_at = x_ptr + (k * n).to(tl.int64) * x_row + (first + tl.arange(0, UB)) * x_step
        pilot = tl.load(pilot_at, mask=units < U, other=0.0).to(ACC)
        last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(n, NB) * by_pos)
        for t in range(split * tiles_per_split, last):
            sample = t // by_pos * NB + i
            position = t % by_pos * PB + p
            mask = (sample < n) & (first + u < U) & (position < P)
            row = (k * n + sample).to(tl.int64)
            given = tl.load(x_ptr + first * x_step + row * x_row + (x_u + position), mask=mask, other=0.0)
            x = given.to(ACC)
            if ACTIVATION != NO_ACTIVATION:
                y = activate(x, parameter, ACTIVATION).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + first * y_step + row * y_row + (y_u + position), y, mask=mask)
            if rows_ptr is not None:
                tl.store(rows_ptr + first * P + row * U * P + (u * P + position), given, mask=mask)
            rows_here = tl.minimum(n - t // by_pos * NB, NB)
            here = (rows_here * tl.minimum(P - t % by_pos * PB, PB)).to(ACC)
            centre = pilot + tl.sum(tl.sum(tl.where(mask, x - pilot[None, :, None], 0.0), 2), 0) / here
            d = tl.where(mask, x - centre[None, :, None], 0.0)
            error = tl.sum(tl.sum(d, 2), 0) / here
            d = tl.where(mask, d.to(SQUARES) - error.to(SQUARES)[None, :, None], 0.0)
            groups = tl.reshape(d * d, [NB, UB, PB // GROUP, GROUP])
            spread = tl.sum(tl.sum(tl.sum(groups, 3).to(tl.float64), 2), 0)
            count, mean, m2 = merge_moments(count, mean, m2, here, centre - pilot + error, spread)
        store_partial(partial_ptr, (split.to(tl.int64) * K + k) * U, plane, units, U, count, mean, m2, pilot)
    elif ACTIVATION != NO_ACTIVATION:
        t = pid - blocks * K * splits
        position = t % by_pos * PB + p
        first = (t // by_pos % blocks).to(tl.int64) * UB
        row = K * n + (t // by_pos // blocks).to(tl.int64) * NB + i
        mask = (row < N) & (first + u < U) & (position < P)
        x = tl.load(x_ptr + first * x_step + row * x_row + (x_u + position), mask=mask, other=0.0).to(ACC)
        y = activate(x, parameter, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + first * y_step + row * y_row + (y_u + position), y, mask=mask)


@triton.jit
def moments_unit(
    x_ptr,
    y_ptr,
    rows_ptr,
    partial_ptr,
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
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    SQUARES: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program (units, sub-batch, split) merges its tiles [value, unit] likewise."""
    m = tl.arange(0, MB)[:, None]
    blocks = tl.cdiv(U, UB)
    pid = tl.program_id(0)
    if pid < blocks * K * splits:
        split = pid % splits
        k = pid // splits % K
        units = (pid // splits // K).to(tl.int64) * UB + tl.arange(0, UB)
        u = units[None, :]
        M = n * P
        count = tl.full([], 0.0, ACC)  # the same for every unit
        mean = tl.zeros([UB], ACC)
        m2 = tl.zeros([UB], tl.float64)
        # one value of each sample is taken off first: |mean| >> std costs nothing
        pilot_at = x_ptr + (k * n).to(tl.int64) * x_row + units
        pilot = tl.load(pilot_at, mask=units < U, other=0.0).to(ACC)
        last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(M, MB))
        for t in range(split * tiles_per_split, last):
            value = t * MB + m
            mask = (value < M) & (u < U)
            row = (k * n + value // P).to(tl.int64)
            position = (value % P).to(tl.int64)
            given = tl.load(x_ptr + row * x_row + position * x_pos + u, mask=mask, other=0.0)
            x = given.to(ACC)
            if ACTIVATION != NO_ACTIVATION:
                y = activate(x, parameter, ACTIVATION).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + row * y_row + position * y_pos + u, y, mask=mask)
            if rows_ptr is not None:
                tl.store(rows_ptr + (row * P + position) * U + u, given, mask=mask)
            here = tl.minimum(M - t * MB, MB).to(ACC)
            centre = pilot + tl.sum(tl.where(mask, x - pilot[None, :], 0.0), 0) / here
            d = tl.where(mask, x - centre[None, :], 0.0)
            error = tl.sum(d, 0) / here
            d = tl.where(mask, d.to(SQUARES) - error.to(SQUARES)[None, :], 0.0)
            spread = tl.sum(d * d, 0)
            count, mean, m2 = merge_moments(count, mean, m2, here, centre - pilot + error, spread)
        store_partial(partial_ptr, (split.to(tl.int64) * K + k) * U, plane, units, U, count, mean, m2, pilot)
    elif ACTIVATION != NO_ACTIVATION:
        t = pid - blocks * K * splits
        u = (t % blocks).to(tl.int64) * UB + tl.arange(0, UB)[None, :]
        start = (t // blocks).to(tl.int64) * MB
        value = (start % P).to(tl.int32) + m  # counted from the start of a row: a 32-bit division
        row = K * n + start // P + value // P
        position = (value % P).to(tl.int64)
        mask = (row < N) & (u < U)
        x = tl.load(x_ptr + row * x_row + position * x_pos + u, mask=mask, other=0.0).to(ACC)
        y = activate(x, parameter, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * y_row + position * y_pos + u, y, mask=mask)


@triton.jit
def store_partial(partial_ptr, start, plane, units, U, count, mean, m2, pilot):
    """Store a partial sample of each unit: four planes, in each of which it begins at ``start``."""
    at = partial_ptr + start + units
    tl.store(at, count + tl.zeros_like(mean), mask=units < U)
    tl.store(at + plane, mean, mask=units < U)
    tl.store(at + 2 * plane, m2, mask=units < U)
    tl.store(at + 3 * plane, pilot, mask=units < U)


def rule(x: Geometry, writes: bool, itemsize: int) -> Settings:
    """Choose settings: a thread has 16 elements, and what it writes of them; 32 of two bytes alone."""
    few = writes or itemsize > 2
    most = TILE if few else 2 * TILE
    if x.spatial:
        PB = min(power_of_2(x.P), most)
        NB = min(power_of_2(x.n), most // PB)
        UB = min(power_of_2(x.U), most // (NB * PB))
        tile = {"NB": NB, "UB": UB, "PB": PB}
    else:
        UB = min(power_of_2(x.U), 256 // itemsize, max(64, most // power_of_2(x.M)))
        tile = {"MB": min(power_of_2(x.M), most // UB), "UB": UB}
    weight = 2 if few or squares_in_float64(x, itemsize) else 1
    splits = max(1, PROGRAMS // (cdiv(x.U, UB) * x.K))
    return Settings(tile, warps_for(weight * math.prod(tile.values())), splits)


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
    constants["SQUARES"] = tl.float64 if squares_in_float64(x, itemsize) else tl.float32
    per_split = cdiv(tiles, min(tiles, splits))
    splits = cdiv(tiles, per_split)
    grid = (cdiv(x.U, tile["UB"]) * (x.K * splits + rest_tiles),)
    return Launch(kernel, grid, constants, warps), splits, per_split

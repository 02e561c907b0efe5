"""Moments of sub-batches that do not fit on chip: partial samples over many programs, merged in a fixed order."""

import triton
import triton.language as tl

from ...geometry import Geometry
from .formulas import merge_moments
from .launch import Launch, cdiv, dense_units, positions_constant, power_of_2, warps_for

TILE = 4096
PROGRAMS = 1024  # wanted at least: several for each of a GPU's multiprocessors


@triton.jit
def moments_spatial(
    x_ptr,
    partial_ptr,
    K,
    n,
    U,
    P_run_time,
    x_row,
    x_unit,
    plane,
    splits,
    tiles_per_split,
    P_CONSTANT: tl.constexpr,
    X_DENSE: tl.constexpr,
    ACC: tl.constexpr,
    NB: tl.constexpr,
    UB: tl.constexpr,
    PB: tl.constexpr,
):
    """Program (units, sub-batch, split) merges its tiles into count, mean - pilot, m2, pilot."""
    P = P_CONSTANT if P_CONSTANT else P_run_time
    x_step = P if X_DENSE else x_unit
    pid = tl.program_id(0)
    split = pid % splits
    k = pid // splits % K
    first = (pid // splits // K).to(tl.int64) * UB
    i = tl.arange(0, NB)[:, None, None]
    u = tl.arange(0, UB)[None, :, None]
    p = tl.arange(0, PB)[None, None, :]
    by_pos = tl.cdiv(P, PB)
    count = tl.zeros([UB], ACC)
    mean = tl.zeros([UB], ACC)
    m2 = tl.zeros([UB], tl.float64)
    units = first + tl.arange(0, UB)
    pilot_at = x_ptr + (k * n).to(tl.int64) * x_row + first * x_step + tl.arange(0, UB) * x_step
    pilot = tl.load(pilot_at, mask=units < U, other=0.0).to(
        ACC
    )  # one value of each sample: |mean| >> std costs nothing
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(n, NB) * by_pos)
    for t in range(split * tiles_per_split, last):
        sample = t // by_pos * NB + i
        position = t % by_pos * PB + p
        mask = (sample < n) & (first + u < U) & (position < P)
        row = (k * n + sample).to(tl.int64)
        x = tl.load(x_ptr + first * x_step + row * x_row + (u * x_step + position), mask=mask, other=0.0).to(ACC)
        x = tl.where(mask, x - pilot[None, :, None], 0.0)
        rows_here = tl.minimum(n - t // by_pos * NB, NB)
        here = (rows_here * tl.minimum(P - t % by_pos * PB, PB)).to(ACC)
        part = tl.sum(tl.sum(x, 2), 0) / here
        d = tl.where(mask, x - part[None, :, None], 0.0)
        error = tl.sum(tl.sum(d, 2), 0) / here
        d = tl.where(mask, d - error[None, :, None], 0.0)
        count, mean, m2 = merge_moments(
            count, mean, m2, tl.zeros([UB], ACC) + here, part + error, tl.sum(tl.sum(d * d, 2), 0)
        )
    at = partial_ptr + (split.to(tl.int64) * K + k) * U + units
    tl.store(at, count, mask=units < U)
    tl.store(at + plane, mean, mask=units < U)
    tl.store(at + 2 * plane, m2, mask=units < U)
    tl.store(at + 3 * plane, pilot, mask=units < U)


@triton.jit
def moments_unit(
    x_ptr,
    partial_ptr,
    K,
    n,
    U,
    P,
    x_row,
    x_pos,
    plane,
    splits,
    tiles_per_split,
    ACC: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program (units, sub-batch, split) merges its tiles [value, unit] likewise."""
    pid = tl.program_id(0)
    split = pid % splits
    k = pid // splits % K
    units = (pid // splits // K).to(tl.int64) * UB + tl.arange(0, UB)
    u = units[None, :]
    m = tl.arange(0, MB)[:, None]
    M = n * P
    count = tl.zeros([UB], ACC)
    mean = tl.zeros([UB], ACC)
    m2 = tl.zeros([UB], tl.float64)
    pilot_at = x_ptr + (k * n).to(tl.int64) * x_row + units
    pilot = tl.load(pilot_at, mask=units < U, other=0.0).to(
        ACC
    )  # one value of each sample: |mean| >> std costs nothing
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(M, MB))
    for t in range(split * tiles_per_split, last):
        value = t * MB + m
        mask = (value < M) & (u < U)
        row = (k * n + value // P).to(tl.int64)
        x = tl.load(x_ptr + row * x_row + (value % P).to(tl.int64) * x_pos + u, mask=mask, other=0.0).to(ACC)
        x = tl.where(mask, x - pilot[None, :], 0.0)
        here = tl.minimum(M - t * MB, MB).to(ACC)
        part = tl.sum(x, 0) / here
        d = tl.where(mask, x - part[None, :], 0.0)
        error = tl.sum(d, 0) / here
        d = tl.where(mask, d - error[None, :], 0.0)
        wide = d.to(tl.float64)  # few values may go to one unit, so that no errors average out
        spread = tl.sum(wide * wide, 0)
        count, mean, m2 = merge_moments(count, mean, m2, tl.zeros([UB], ACC) + here, part + error, spread)
    at = partial_ptr + (split.to(tl.int64) * K + k) * U + units
    tl.store(at, count, mask=units < U)
    tl.store(at + plane, mean, mask=units < U)
    tl.store(at + 2 * plane, m2, mask=units < U)
    tl.store(at + 3 * plane, pilot, mask=units < U)


def plan(x: Geometry, itemsize: int) -> tuple[Launch, int, int]:
    """Decide the launch; also return splits and tiles in each."""
    if x.spatial:
        PB = min(power_of_2(x.P), TILE)
        NB = min(power_of_2(x.n), max(1, TILE // PB))
        UB = min(power_of_2(x.U), max(1, TILE // (NB * PB)))
        tile, tiles = NB * UB * PB, cdiv(x.n, NB) * cdiv(x.P, PB)
        kernel = moments_spatial
        constants = {"P_CONSTANT": positions_constant(x.P), "X_DENSE": dense_units(x), "NB": NB, "UB": UB, "PB": PB}
    else:
        UB = min(power_of_2(x.U), 256 // itemsize)
        MB = min(power_of_2(x.M), TILE // 2 // UB)
        tile, tiles = MB * UB, cdiv(x.M, MB)
        kernel = moments_unit
        constants = {"MB": MB, "UB": UB}
    programs = cdiv(x.U, UB) * x.K
    splits = min(tiles, max(1, PROGRAMS // programs))
    per_split = cdiv(tiles, splits)
    splits = cdiv(tiles, per_split)
    return (
        Launch(kernel, (programs * splits,), constants, warps_for(tile if x.spatial else 2 * tile)),
        splits,
        per_split,
    )


def arguments(x: Geometry, splits: int, per_split: int) -> tuple[int, ...]:
    """Return the shape arguments of either kernel."""
    step = x.unit_stride if x.spatial else x.pos_stride
    return x.K, x.n, x.U, x.P, x.row_stride, step, splits * x.K * x.U, splits, per_split

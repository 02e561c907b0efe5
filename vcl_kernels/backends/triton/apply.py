"""dx = scale · (x - mean) + shift from given coefficients; zero for rows that take no part."""

import triton
import triton.language as tl

from ...geometry import Geometry
from .launch import Launch, cdiv, dense_units, positions_constant, power_of_2, warps_for

TILE = 4096


@triton.jit
def apply_spatial(
    x_ptr,
    dx_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    N,
    K,
    n,
    U,
    P_run_time,
    x_row,
    x_unit,
    dx_row,
    dx_unit,
    P_CONSTANT: tl.constexpr,
    X_DENSE: tl.constexpr,
    DX_DENSE: tl.constexpr,
    SHIFT: tl.constexpr,
    ACC: tl.constexpr,
    UB: tl.constexpr,
    PB: tl.constexpr,
):
    """Program: tile [channel, position] of one row."""
    P = P_CONSTANT if P_CONSTANT else P_run_time
    x_step = P if X_DENSE else x_unit
    dx_step = P if DX_DENSE else dx_unit
    by_pos = tl.cdiv(P, PB)
    pid = tl.program_id(0)
    position = pid % by_pos * PB + tl.arange(0, PB)[None, :]
    blocks = tl.cdiv(U, UB)
    first = (pid // by_pos % blocks).to(tl.int64) * UB
    row = pid // by_pos // blocks
    u = tl.arange(0, UB)[:, None]
    valid = first + u < U
    mask = valid & (position < P)
    at = dx_ptr + row.to(tl.int64) * dx_row + first * dx_step + (u * dx_step + position)
    if row < K * n:
        x = tl.load(
            x_ptr + row.to(tl.int64) * x_row + first * x_step + (u * x_step + position), mask=mask, other=0.0
        ).to(ACC)
        c = (row // n).to(tl.int64) * U + first + u
        mean = tl.load(mean_ptr + c, mask=valid, other=0.0)
        scale = tl.load(scale_ptr + c, mask=valid, other=0.0)
        dx = scale * (x - mean)
        if SHIFT:
            dx += tl.load(shift_ptr + c, mask=valid, other=0.0)
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(at, tl.zeros([UB, PB], dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def apply_unit(
    x_ptr,
    dx_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    N,
    K,
    n,
    U,
    P,
    x_row,
    x_pos,
    dx_row,
    dx_pos,
    SHIFT: tl.constexpr,
    ACC: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program: tile [value, unit] of one sub-batch, or of the rows past the last."""
    blocks = tl.cdiv(U, UB)
    tiles = tl.cdiv(n * P, MB)
    pid = tl.program_id(0)
    units = (pid % blocks).to(tl.int64) * UB + tl.arange(0, UB)
    t = pid // blocks % tiles
    k = pid // blocks // tiles
    m = t * MB + tl.arange(0, MB)[:, None]
    row = (k * n + m // P).to(tl.int64)
    position = (m % P).to(tl.int64)
    valid = units[None, :] < U
    mask = valid & (m < n * P) & (row < N)
    at = dx_ptr + row * dx_row + position * dx_pos + units[None, :]
    if k < K:
        x = tl.load(x_ptr + row * x_row + position * x_pos + units[None, :], mask=mask, other=0.0).to(ACC)
        c = k.to(tl.int64) * U + units[None, :]
        dx = tl.load(scale_ptr + c, mask=valid, other=0.0) * (x - tl.load(mean_ptr + c, mask=valid, other=0.0))
        if SHIFT:
            dx += tl.load(shift_ptr + c, mask=valid, other=0.0)
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(at, tl.zeros([MB, UB], dx_ptr.dtype.element_ty), mask=mask)


def plan(x: Geometry, dx: Geometry, itemsize: int) -> Launch:
    """Decide the launch; ``dx.N`` rows are written."""
    if x.spatial:
        PB = min(power_of_2(x.P), 1024)
        UB = min(power_of_2(x.U), TILE // PB)
        constants = {
            "P_CONSTANT": positions_constant(x.P),
            "X_DENSE": dense_units(x),
            "DX_DENSE": dense_units(dx),
            "UB": UB,
            "PB": PB,
        }
        grid = (cdiv(x.P, PB) * cdiv(x.U, UB) * dx.N,)
        return Launch(apply_spatial, grid, constants, warps_for(UB * PB))
    UB = min(power_of_2(x.U), 512 // itemsize)
    MB = min(power_of_2(x.M), max(1, TILE // UB))
    groups = cdiv(dx.N, x.n)  # sub-batches, and as many more as hold the remaining rows
    grid = (cdiv(x.U, UB) * cdiv(x.M, MB) * groups,)
    return Launch(apply_unit, grid, {"MB": MB, "UB": UB}, warps_for(MB * UB))


def arguments(x: Geometry, dx: Geometry) -> tuple[int, ...]:
    """Return the shape arguments of either kernel."""
    if x.spatial:
        return dx.N, x.K, x.n, x.U, x.P, x.row_stride, x.unit_stride, dx.row_stride, dx.unit_stride
    return dx.N, x.K, x.n, x.U, x.P, x.row_stride, x.pos_stride, dx.row_stride, dx.pos_stride

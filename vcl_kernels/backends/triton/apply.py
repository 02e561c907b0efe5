"""dx = dy · act' + g · (scale · (x - mean) + shift): what backward applies to every element, in one pass.

Each term is there if its tensors are. The second is zero for rows that take no part.
"""

import functools

import triton
import triton.language as tl

from ...geometry import Geometry
from .activations import times_derivative
from .launch import RUN_TIME, Launch, Settings, cdiv, dense_units, fitting, positions_constant, power_of_2, warps_for

TILE = 4096


@triton.jit(do_not_specialize=RUN_TIME)
def apply_spatial(
    saved_ptr,
    rows_ptr,
    dy_ptr,
    dx_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    g_ptr,
    parameter: "fp64",  # noqa: F821
    N,
    K,
    n,
    U,
    P_run_time,
    saved_row,
    saved_unit,
    dx_row,
    dx_unit,
    P_CONSTANT: tl.constexpr,
    SAVED_DENSE: tl.constexpr,
    DX_DENSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ACC: tl.constexpr,
    UB: tl.constexpr,
    PB: tl.constexpr,
):
    """Program: tile [channel, position] of one row. x is in rows or, without them, what was saved."""
    P = P_CONSTANT if P_CONSTANT else P_run_time
    saved_step = P if SAVED_DENSE else saved_unit
    dx_step = P if DX_DENSE else dx_unit
    by_pos = tl.cdiv(P, PB)
    pid = tl.program_id(0)
    position = pid % by_pos * PB + tl.arange(0, PB)[None, :]
    blocks = tl.cdiv(U, UB)
    first = (pid // by_pos % blocks).to(tl.int64) * UB
    k = pid // by_pos // blocks // n
    row = (pid // by_pos // blocks).to(tl.int64)
    u = tl.arange(0, UB)[:, None]
    valid = first + u < U
    mask = valid & (position < P)
    saved_u = u * P if SAVED_DENSE else u.to(tl.int64) * saved_unit  # a distance between channels may be large
    dx_u = u * P if DX_DENSE else u.to(tl.int64) * dx_unit
    saved_at = row * saved_row + first * saved_step + (saved_u + position)
    dx_at = row * dx_row + first * dx_step + (dx_u + position)
    dx = tl.zeros([UB, PB], ACC)
    if dy_ptr is not None:
        dx = tl.load(dy_ptr + dx_at, mask=mask, other=0.0).to(ACC)
        if ACTIVATION != "identity":
            saved = tl.load(saved_ptr + saved_at, mask=mask, other=0.0).to(ACC)
            dx = times_derivative(dx, saved, parameter, ACTIVATION, FROM_OUTPUT)
    if mean_ptr is not None and k < K:
        if rows_ptr is not None:
            x = tl.load(rows_ptr + row * U * P + first * P + (u * P + position), mask=mask, other=0.0).to(ACC)
        elif dy_ptr is not None and ACTIVATION != "identity":
            x = saved
        else:
            x = tl.load(saved_ptr + saved_at, mask=mask, other=0.0).to(ACC)
        dx += loss_gradient(x, mean_ptr, scale_ptr, shift_ptr, g_ptr, k.to(tl.int64) * U + first + u, valid)
    tl.store(dx_ptr + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUN_TIME)
def apply_unit(
    saved_ptr,
    rows_ptr,
    dy_ptr,
    dx_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    g_ptr,
    parameter: "fp64",  # noqa: F821
    N,
    K,
    n,
    U,
    P,
    saved_row,
    saved_pos,
    dx_row,
    dx_pos,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ACC: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program: tile [value, unit] of n rows: a sub-batch, or as many rows past the last."""
    blocks = tl.cdiv(U, UB)
    tiles = tl.cdiv(n * P, MB)
    pid = tl.program_id(0)
    u = (pid % blocks).to(tl.int64) * UB + tl.arange(0, UB)[None, :]
    t = pid // blocks % tiles
    k = pid // blocks // tiles
    m = t * MB + tl.arange(0, MB)[:, None]
    row = (k * n + m // P).to(tl.int64)
    position = (m % P).to(tl.int64)
    valid = u < U
    mask = valid & (m < n * P) & (row < N)
    saved_at = row * saved_row + position * saved_pos + u
    dx_at = row * dx_row + position * dx_pos + u
    dx = tl.zeros([MB, UB], ACC)
    if dy_ptr is not None:
        dx = tl.load(dy_ptr + dx_at, mask=mask, other=0.0).to(ACC)
        if ACTIVATION != "identity":
            saved = tl.load(saved_ptr + saved_at, mask=mask, other=0.0).to(ACC)
            dx = times_derivative(dx, saved, parameter, ACTIVATION, FROM_OUTPUT)
    if mean_ptr is not None and k < K:
        if rows_ptr is not None:
            x = tl.load(rows_ptr + (row * P + position) * U + u, mask=mask, other=0.0).to(ACC)
        elif dy_ptr is not None and ACTIVATION != "identity":
            x = saved
        else:
            x = tl.load(saved_ptr + saved_at, mask=mask, other=0.0).to(ACC)
        dx += loss_gradient(x, mean_ptr, scale_ptr, shift_ptr, g_ptr, k.to(tl.int64) * U + u, valid)
    tl.store(dx_ptr + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def loss_gradient(x, mean_ptr, scale_ptr, shift_ptr, g_ptr, at, valid):
    """g · (scale · (x - mean) + shift), of coefficients found at ``at``."""
    mean = tl.load(mean_ptr + at, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + at, mask=valid, other=0.0)
    if g_ptr is not None:
        scale *= tl.load(g_ptr)
    dx = scale * (x - mean)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + at, mask=valid, other=0.0)
        if g_ptr is not None:
            shift *= tl.load(g_ptr)
        dx += shift
    return dx


@functools.lru_cache(maxsize=1024)
def rule(saved: Geometry, dx: Geometry, itemsize: int) -> Settings:
    """Choose settings: a thread has 16 elements of each of four tensors.

    8 where coefficients take as many registers: in float64, of many units, and by unit in two bytes.
    """
    weight = 4 if itemsize == 8 or (dx.P <= 16 if saved.spatial else itemsize == 2) else 2
    if saved.spatial:
        PB = fitting(dx.P, 1024)
        UB = min(power_of_2(dx.U), TILE // PB)
        return Settings({"UB": UB, "PB": PB}, warps_for(weight * UB * PB))
    UB = min(power_of_2(dx.U), 128, 512 // itemsize)
    MB = min(power_of_2(dx.M), max(1, TILE // UB))
    return Settings({"MB": MB, "UB": UB}, warps_for(weight * MB * UB))


def plan(saved: Geometry, dx: Geometry, itemsize: int, settings: Settings | None = None) -> Launch:
    """Decide the launch; ``dx.N`` rows are written."""
    tile, warps, _ = settings or rule(saved, dx, itemsize)
    blocks = cdiv(dx.U, tile["UB"])
    if saved.spatial:
        constants = {
            "P_CONSTANT": positions_constant(dx.P),
            "SAVED_DENSE": dense_units(saved),
            "DX_DENSE": dense_units(dx),
            **tile,
        }
        return Launch(apply_spatial, (cdiv(dx.P, tile["PB"]) * blocks * dx.N,), constants, warps)
    groups = cdiv(dx.N, dx.n)  # sub-batches, and as many more as hold the remaining rows
    return Launch(apply_unit, (blocks * cdiv(dx.M, tile["MB"]) * groups,), dict(tile), warps)

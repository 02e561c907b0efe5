"""Loss and gradient in one pass: a unit's K·M values are read once, stay on chip, and leave as dx."""

import functools

import triton
import triton.language as tl

from ...geometry import Geometry
from .formulas import coefficients
from .launch import RUN_TIME, Launch, Settings, cdiv, dense_units, positions_constant, power_of_2, warps_for

# Elements of a tile, padding included, of which 16 warps hold 32 or 16 a thread in registers: where units are
# contiguous, or P is odd, addresses take as many again, and more would spill.
MOST_SPATIAL = 16384
MOST_UNIT = 8192


@triton.jit(do_not_specialize=RUN_TIME)
def one_pass_spatial(
    x_ptr,
    dx_ptr,
    loss_ptr,
    dbeta_ptr,
    beta_ptr,
    beta_value: "fp64",  # noqa: F821
    beta_min: "fp64",  # noqa: F821
    factor: "fp64",  # noqa: F821
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
    FORM: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    KB: tl.constexpr,
    NB: tl.constexpr,
    UB: tl.constexpr,
    PB: tl.constexpr,
):
    """Tile [sub-batch, sample, channel, position]; the program of a channel holds all of its values."""
    P = P_CONSTANT if P_CONSTANT else P_run_time
    x_step = P if X_DENSE else x_unit
    dx_step = P if DX_DENSE else dx_unit
    k = tl.arange(0, KB)[:, None, None, None]
    i = tl.arange(0, NB)[None, :, None, None]
    first = tl.program_id(0).to(tl.int64) * UB
    u = tl.arange(0, UB)[None, None, :, None]
    p = tl.arange(0, PB)[None, None, None, :]
    row = (k * n + i).to(tl.int64)
    mask = (k < K) & (i < n) & (first + u < U) & (p < P)
    x_u = u * P if X_DENSE else u.to(tl.int64) * x_unit  # a distance between channels may be large
    x = tl.load(x_ptr + first * x_step + row * x_row + (x_u + p), mask=mask, other=0.0).to(ACC)

    M = n * P
    mean = quotient(tl.sum(tl.sum(x, 3), 1), M)
    d = tl.where(mask, x - mean[:, None, :, None], 0.0)
    error = quotient(tl.sum(tl.sum(d, 3), 1), M)  # the rounding of the mean
    d = tl.where(mask, d - error[:, None, :, None], 0.0)
    m2 = tl.sum(tl.sum(d * d, 3), 1)

    units = first + tl.arange(0, UB)
    loss, scale, dbeta = coefficients(
        m2, tl.arange(0, KB)[:, None], K, M, units, units < U, beta_ptr, beta_value, beta_min, factor,
        FORM, BETA, ACC, KB, UB,
    )  # fmt: skip
    tl.store(loss_ptr + units, loss, mask=units < U)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + units, dbeta, mask=units < U)
    dx = (scale[:, None, :, None] * d).to(dx_ptr.dtype.element_ty)
    dx_u = u * P if DX_DENSE else u.to(tl.int64) * dx_unit
    at = dx_ptr + first * dx_step + (dx_u + p)
    tl.store(at + row * dx_row, dx, mask=mask)
    one = tl.arange(0, 1)[:, None, None, None]
    for start in range(K * n, N, NB):  # rows that take no part
        rest = (start + one + i).to(tl.int64)
        tail = (rest < N) & (first + u < U) & (p < P)
        tl.store(at + rest * dx_row, tl.zeros([1, NB, UB, PB], dx_ptr.dtype.element_ty), mask=tail)


@triton.jit(do_not_specialize=RUN_TIME)
def one_pass_unit(
    x_ptr,
    dx_ptr,
    loss_ptr,
    dbeta_ptr,
    beta_ptr,
    beta_value: "fp64",  # noqa: F821
    beta_min: "fp64",  # noqa: F821
    factor: "fp64",  # noqa: F821
    N,
    K,
    n,
    U,
    P,
    x_row,
    x_pos,
    dx_row,
    dx_pos,
    FORM: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    KB: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Tile [sub-batch, value, unit], units contiguous; value m of a sub-batch is (sample m // P, position m % P)."""
    M = n * P
    k = tl.arange(0, KB)[:, None, None]
    m = tl.arange(0, MB)[None, :, None]
    units = tl.program_id(0).to(tl.int64) * UB + tl.arange(0, UB)
    u = units[None, None, :]
    row = (k * n + m // P).to(tl.int64)
    position = (m % P).to(tl.int64)
    mask = (k < K) & (m < M) & (u < U)
    x = tl.load(x_ptr + row * x_row + position * x_pos + u, mask=mask, other=0.0).to(ACC)

    mean = quotient(tl.sum(x, 1), M)
    d = tl.where(mask, x - mean[:, None, :], 0.0)
    error = quotient(tl.sum(d, 1), M)  # the rounding of the mean
    d = tl.where(mask, d - error[:, None, :], 0.0)
    m2 = tl.sum(d * d, 1)

    loss, scale, dbeta = coefficients(
        m2, tl.arange(0, KB)[:, None], K, M, units, units < U, beta_ptr, beta_value, beta_min, factor,
        FORM, BETA, ACC, KB, UB,
    )  # fmt: skip
    tl.store(loss_ptr + units, loss, mask=units < U)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + units, dbeta, mask=units < U)
    dx = (scale[:, None, :] * d).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + row * dx_row + position * dx_pos + u, dx, mask=mask)
    one = tl.arange(0, 1)[:, None, None]
    for start in range(0, (N - K * n) * P, MB):  # rows that take no part
        t = start + one + m
        rest = (K * n + t // P).to(tl.int64)
        tail = (rest < N) & (u < U)
        at = dx_ptr + rest * dx_row + (t % P).to(tl.int64) * dx_pos + u
        tl.store(at, tl.zeros([1, MB, UB], dx_ptr.dtype.element_ty), mask=tail)


@triton.jit
def quotient(total, M):
    """Total / M, to nearest, which a GPU's usual division in float32 is not: equal values have deviations of 0."""
    if total.dtype == tl.float64:
        return total / M
    return tl.div_rn(total, M.to(tl.float32))


def padded_sample(g: Geometry) -> int:
    """Elements that one unit takes in a tile."""
    if g.spatial:
        return power_of_2(g.K) * power_of_2(g.n) * power_of_2(g.P)
    return power_of_2(g.K) * power_of_2(g.M)


def fits(g: Geometry, itemsize: int) -> bool:
    """Whether a unit, or 32 bytes of contiguous units, fits on chip."""
    if g.spatial:
        return padded_sample(g) <= MOST_SPATIAL // (1 + g.P % 2)
    return padded_sample(g) * min(32 // itemsize, power_of_2(g.U)) <= MOST_UNIT


@functools.lru_cache(maxsize=1024)
def rule(x: Geometry, itemsize: int) -> Settings:
    """Choose settings for a unit that fits: of them UB and warps are free."""
    sample, KB = padded_sample(x), power_of_2(x.K)
    if x.spatial:
        UB = min(power_of_2(x.U), max(1, 4096 // sample))
        warps = warps_for(sample * UB * (1 + x.P % 2))
        return Settings({"KB": KB, "NB": power_of_2(x.n), "UB": UB, "PB": power_of_2(x.P)}, warps)
    # coefficients are float64, [KB, UB] of them
    UB = min(power_of_2(x.U), max(32 // itemsize, min(128, 8192 // sample, 256 // KB)))
    warps = max(4, min(16, KB * UB // min(16 * itemsize, 64)), warps_for(sample * UB))
    return Settings({"KB": KB, "MB": power_of_2(x.M), "UB": UB}, warps)


def plan(x: Geometry, dx: Geometry, itemsize: int, settings: Settings | None = None) -> Launch:
    """Decide the launch for a unit that fits."""
    tile, warps, _ = settings or rule(x, itemsize)
    grid = (cdiv(x.U, tile["UB"]),)
    if not x.spatial:
        return Launch(one_pass_unit, grid, dict(tile), warps)
    constants = {"P_CONSTANT": positions_constant(x.P), "X_DENSE": dense_units(x), "DX_DENSE": dense_units(dx), **tile}
    return Launch(one_pass_spatial, grid, constants, warps)

"""Loss and gradient in one pass: a unit's K·M values are read once, stay on chip, and leave as dx."""

import functools

import triton
import triton.language as tl

from ...geometry import Geometry
from .formulas import coefficients
from .launch import RUN_TIME, Launch, Settings, aligned, cdiv, even, power_of_2, warps_for
from .moments import SHRUNK, merged, value_at
from .runs import by_unit, of_unit, run_length, run_steps, run_tile, unit_in_run, value_steps

# Elements of a tile, padding included, of which a thread of 8 warps holds 64 in registers, or one of 16 warps 16: where
# units are contiguous addresses take as many again, and more would spill.
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
    P,
    x_row,
    x_step,
    to_row,
    to_step,
    ALIGNED: tl.constexpr,
    FORM: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    NB: tl.constexpr,
    KB: tl.constexpr,
    UB: tl.constexpr,
    FB: tl.constexpr,
):
    """Tile [row, sub-batch · element of a run]: the program of UB units holds all of their values.

    Of two dimensions, as in moments: rows are a thread's own. Those of three, Triton 3.6 spreads over threads.
    """
    PB: tl.constexpr = FB // UB
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NB)[:, None]
    e = tl.arange(0, KB * FB)
    k, f = e // FB, e % FB
    p = tl.arange(0, PB)[None, :, None]
    units = group * UB + tl.arange(0, UB)
    length = run_length(group, U, P, UB, ALIGNED)
    row = k[None, :] * n + i
    mask = (i < n) & ((k < K) & (f < length))[None, :]
    x_at = x_ptr + group * x_step * ALIGNED
    to = dx_ptr + group * to_step * ALIGNED
    x = tl.load(x_at + row.to(tl.int64) * x_row * ALIGNED + f[None, :], mask=mask, other=0.0).to(ACC)
    # its first value is taken off all others of an element: |mean| >> std costs nothing
    first = first_row(x, i)
    d = tl.where(i < n, x - first[None, :], 0.0)

    own = tl.sum(d, 0) * (1.0 / n.to(ACC))
    own_m2 = sum_of_squares(tl.where(i < n, d - own[None, :], 0.0), 0)
    mean = by_unit(first.to(tl.float64) + own.to(tl.float64), P, KB, UB, FB)
    m2 = tl.where(p < P, by_unit(own_m2, P, KB, UB, FB), 0.0)
    mean, m2 = merged(mean, m2, tl.where(p < P, n, 0), (n * P).to(tl.float64), 1, ACC)
    loss, scale, dbeta = coefficients(
        m2, tl.arange(0, KB)[:, None], K, n * P, units, units < U, beta_ptr, beta_value, beta_min, factor,
        FORM, BETA, ACC, KB, UB,
    )  # fmt: skip
    tl.store(loss_ptr + units, loss, mask=units < U)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + units, dbeta, mask=units < U)
    unit = tl.minimum(unit_in_run(f, P), UB - 1)
    rounded = mean.to(ACC)
    error = of_unit((mean - rounded.to(tl.float64)).to(ACC), k, unit, KB, UB, FB)
    d = x - of_unit(rounded, k, unit, KB, UB, FB)[None, :] - error[None, :]
    dx = of_unit(scale, k, unit, KB, UB, FB)[None, :] * d
    tl.store(to + row.to(tl.int64) * to_row * ALIGNED + f[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    of_run = tl.arange(0, FB)[None, :]
    for start in range(K * n, N, NB):  # rows that take no part
        rest = start + i
        tail = (rest < N) & (of_run < length)
        rest_at = to + rest.to(tl.int64) * to_row * ALIGNED + of_run
        tl.store(rest_at, tl.zeros([NB, FB], dx_ptr.dtype.element_ty), mask=tail)


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
    P,
    x_row,
    x_pos,
    to_pos,
    M,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    FORM: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    KB: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Tile [sub-batch, value, unit], units contiguous; value m of a sub-batch is (sample m // P, position m % P)."""
    U = to_pos.to(tl.int64) * ALIGNED
    k = tl.arange(0, KB)[:, None, None]
    m = tl.arange(0, MB)[None, :, None]
    units = tl.program_id(0).to(tl.int64) * UB + tl.arange(0, UB)
    u = units[None, None, :]
    mask = (k < K) & (m < M) & (u < U)
    at = (k * n).to(tl.int64) * x_row + value_at(m, P, x_row, x_pos, EVEN)
    x = tl.load(x_ptr + at * ALIGNED + u, mask=mask, other=0.0).to(ACC)

    mean = quotient(tl.sum(x, 1), M)
    d = tl.where(mask, x - mean[:, None, :], 0.0)
    error = quotient(tl.sum(d, 1), M)  # the rounding of the mean
    d = tl.where(mask, d - error[:, None, :], 0.0)
    m2 = sum_of_squares(d, 1)

    loss, scale, dbeta = coefficients(
        m2, tl.arange(0, KB)[:, None], K, M, units, units < U, beta_ptr, beta_value, beta_min, factor,
        FORM, BETA, ACC, KB, UB,
    )  # fmt: skip
    tl.store(loss_ptr + units, loss, mask=units < U)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + units, dbeta, mask=units < U)
    dx = (scale[:, None, :] * d).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + (k * M + m).to(tl.int64) * to_pos * ALIGNED + u, dx, mask=mask)
    one = tl.arange(0, 1)[:, None, None]
    end = N.to(tl.int64) * P
    for start in range(K * M, end, MB):  # rows that take no part
        rest = (start + one + m).to(tl.int64)
        rest_at = dx_ptr + rest * to_pos * ALIGNED + u
        tl.store(rest_at, tl.zeros([1, MB, UB], dx_ptr.dtype.element_ty), mask=(rest < end) & (u < U))


@triton.jit
def quotient(total, M):
    """Total / M, to nearest, which a GPU's usual division in float32 is not: equal values have deviations of 0."""
    if total.dtype == tl.float64:
        return total / M
    else:  # what follows a return is compiled too
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
        UB, _ = run_tile(x, 256, min(512, MOST_SPATIAL // sample * power_of_2(x.P)), (1, 1))
        FB = UB * power_of_2(x.P)
        warps = max(1 if UB == 1 else 2, min(8, warps_for(sample * UB)))
        return Settings({"NB": power_of_2(x.n), "KB": KB, "UB": UB, "FB": FB}, warps)
    # coefficients are float64, [KB, UB] of them
    UB = min(power_of_2(x.U), max(32 // itemsize, min(128, 8192 // sample, 256 // KB)))
    warps = max(4, min(16, KB * UB // min(16 * itemsize, 64)), warps_for(sample * UB))
    return Settings({"KB": KB, "MB": power_of_2(x.M), "UB": UB}, warps)


def plan(x: Geometry, itemsize: int, settings: Settings | None = None) -> tuple[Launch, tuple[int, ...]]:
    """Decide the launch for a unit that fits, and its shape arguments; distances are in units of its alignment."""
    tile, warps, _ = settings or rule(x, itemsize)
    grid = (cdiv(x.U, tile["UB"]),)
    if x.spatial:
        by, steps = aligned(run_steps(x, tile["UB"]))
        launch = Launch(one_pass_spatial, grid, {"ALIGNED": by, **tile}, warps, 255)
        return launch, (x.N, x.K, x.n, x.U, x.P, *steps)
    by, steps = aligned(value_steps(x))
    launch = Launch(one_pass_unit, grid, {"ALIGNED": by, "EVEN": even(x), **tile}, warps)
    return launch, (x.N, x.K, x.n, x.P, *steps, x.M)

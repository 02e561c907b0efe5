"""dx = dy · act' + g · (scale · (x - mean) + shift): what backward applies to every element, in one pass.

Each term is there if its tensors are. The second is zero for rows that take no part.
"""

import functools

import triton
import triton.language as tl

from ...geometry import Geometry
from .activations import times_derivative
from .launch import RUN_TIME, WARPS, Launch, Settings, aligned, cdiv, even, power_of_2
from .moments import value_at
from .runs import run_length, run_steps, run_tile, unit_in_run, value_steps

TILES = 4  # at most for which a program reads coefficients once
ROWS = 4  # of a tile, which one thread has
ELEMENTS = 8  # neighbouring ones of a row, which one thread has; of float64 half as many
REGISTERS = 160  # of a thread at most: 12 warps of a multiprocessor have as many, and some are left
UNIT_WARPS = 4  # of a program by unit, where it has so many values


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
    P,
    x_row,
    x_step,
    to_row,
    to_step,
    rows,
    parts,
    run_units,
    groups,
    ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ACC: tl.constexpr,
    NB: tl.constexpr,
    FB: tl.constexpr,
):
    """Program: tiles [row, element of a run of run_units units] of some rows of a sub-batch, or past the last.

    x is in rows or, without them, what was saved.
    """
    i = tl.arange(0, NB)[:, None]
    f = tl.arange(0, FB)
    by_pos = 1 if SHARED else tl.cdiv(P, FB)
    pid = tl.program_id(0)
    rest = pid // by_pos
    position = (pid - rest * by_pos).to(P.dtype) * FB + f
    part = rest // groups
    group = (rest - part * groups).to(tl.int64)
    k = part // parts
    begin = (part - k * parts).to(n.dtype) * rows
    of_k = k.to(tl.int64) * n
    end = tl.minimum(begin + rows, tl.minimum(n, N - of_k).to(n.dtype))
    units = group * run_units + (unit_in_run(f, P) if SHARED else tl.arange(0, 1))
    valid = position < run_length(group, U, P, run_units, ALIGNED)
    saved_at = (of_k * x_row + group * x_step) * ALIGNED + position[None, :]
    dx_at = (of_k * to_row + group * to_step) * ALIGNED + position[None, :]
    at = k.to(tl.int64) * U + units
    taken = (units < U) & (k < K)
    mean, scale, shift = given_coefficients(mean_ptr, scale_ptr, shift_ptr, g_ptr, at, taken)
    for first in range(begin, end, NB):
        sample = first + i
        mask = (sample < end) & valid[None, :]
        from_at = saved_at + sample.to(tl.int64) * x_row * ALIGNED
        to_at = dx_at + sample.to(tl.int64) * to_row * ALIGNED
        dx = dx_of_tile(
            saved_ptr, rows_ptr, dy_ptr, mean_ptr, shift_ptr, from_at, to_at, mask, mean, scale, shift, k < K,
            parameter, ACTIVATION, FROM_OUTPUT, ACC,
        )  # fmt: skip
        tl.store(dx_ptr + to_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
    P,
    x_row,
    x_pos,
    to_pos,
    M,
    rows,
    parts,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ACC: tl.constexpr,
    RB: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program: tiles [RB, MB, UB] of RB · MB values, of some ``rows`` of those of a sub-batch or past the last."""
    U = to_pos.to(tl.int64) * ALIGNED
    m = tl.arange(0, RB)[:, None, None] * MB + tl.arange(0, MB)[None, :, None]
    blocks = tl.cdiv(U, UB).to(tl.int32)
    pid = tl.program_id(0)
    part = pid // blocks
    u = (pid - part * blocks).to(tl.int64) * UB + tl.arange(0, UB)[None, :]
    valid = u < U
    k = part // parts
    begin = (part - k * parts).to(M.dtype) * rows
    k = k.to(tl.int64)
    end = tl.minimum(tl.minimum(begin + rows, M), (N - k * n) * P)
    x_at = k * n * x_row * ALIGNED
    of_k = k * M * to_pos * ALIGNED
    at, taken = (k * U + u)[None, :, :], (valid & (k < K))[None, :, :]
    mean, scale, shift = given_coefficients(mean_ptr, scale_ptr, shift_ptr, g_ptr, at, taken)
    for start in range(begin, end, RB * MB):
        value = start + m
        mask = (value < end) & valid[None, :, :]
        from_at = x_at + value_at(value, P, x_row, x_pos, EVEN) * ALIGNED + u[None, :, :]
        to_at = of_k + value.to(tl.int64) * to_pos * ALIGNED + u[None, :, :]
        dx = dx_of_tile(
            saved_ptr, rows_ptr, dy_ptr, mean_ptr, shift_ptr, from_at, to_at, mask, mean, scale, shift, k < K,
            parameter, ACTIVATION, FROM_OUTPUT, ACC,
        )  # fmt: skip
        tl.store(dx_ptr + to_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def given_coefficients(mean_ptr, scale_ptr, shift_ptr, g_ptr, at, valid):
    """Mean, scale and shift at ``at``, the last two times the upstream gradient; 0 where there are none."""
    if mean_ptr is None:
        return 0.0, 0.0, 0.0
    else:
        mean = tl.load(mean_ptr + at, mask=valid, other=0.0)
        scale = tl.load(scale_ptr + at, mask=valid, other=0.0)
        shift = tl.zeros_like(scale)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + at, mask=valid, other=0.0)
        if g_ptr is not None:
            g = tl.load(g_ptr)
            scale *= g
            shift *= g
        return mean, scale, shift


@triton.jit
def dx_of_tile(
    saved_ptr,
    rows_ptr,
    dy_ptr,
    mean_ptr,
    shift_ptr,
    saved_at,
    dx_at,
    mask,
    mean,
    scale,
    shift,
    taking_part,
    parameter,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """The two terms of dx for a tile, each if its tensors are there."""
    dx = tl.zeros(mask.shape, ACC)
    if dy_ptr is not None:
        dx = tl.load(dy_ptr + dx_at, mask=mask, other=0.0).to(ACC)
    if dy_ptr is not None and ACTIVATION != "identity":
        saved = tl.load(saved_ptr + saved_at, mask=mask, other=0.0).to(ACC)
        dx = times_derivative(dx, saved, parameter, ACTIVATION, FROM_OUTPUT)
    if mean_ptr is not None and taking_part:
        if rows_ptr is not None:
            x = tl.load(rows_ptr + dx_at, mask=mask, other=0.0).to(ACC)
        elif dy_ptr is not None and ACTIVATION != "identity":
            x = saved
        else:
            x = tl.load(saved_ptr + saved_at, mask=mask, other=0.0).to(ACC)
        dx += scale * (x - mean)
        if shift_ptr is not None:
            dx += shift
    return dx


@functools.lru_cache(maxsize=1024)
def rule(saved: Geometry, dx: Geometry, itemsize: int) -> Settings:
    """Choose settings."""
    lanes = 32 * ELEMENTS // (2 if itemsize == 8 else 1)
    if dx.spatial:
        UB, FB = run_tile(saved, 256, 512, (512, 512))
        NB = min(power_of_2(dx.n), ROWS if itemsize == 2 else ROWS // 2)  # 64 bytes of a thread
        tile, warps = {"NB": NB, "UB": UB, "FB": FB}, max(1, FB // lanes)
    else:
        RB = ROWS // 2 if dx.M in (5, 6) else ROWS  # of which 6 are covered with less
        UB = min(power_of_2(dx.U), 64 if dx.M >= 64 else lanes)
        MB = min(power_of_2(cdiv(dx.M, 2 * RB)), UNIT_WARPS * lanes // UB)
        tile, warps = {"RB": RB, "MB": MB, "UB": UB}, max(1, MB * UB // lanes)
    tiles = tiles_of(dx, tile)
    return Settings(tile, warps, max(cdiv(tiles, TILES), min(tiles, cdiv(WARPS, programs_of(dx, tile) * warps))))


def tiles_of(x: Geometry, tile: dict[str, int]) -> int:
    """Return how many tiles cover a sub-batch of the units and positions that a program has."""
    return cdiv(x.n, tile["NB"]) if x.spatial else cdiv(x.M, tile["RB"] * tile["MB"])


def programs_of(x: Geometry, tile: dict[str, int]) -> int:
    """Return how many programs there are if each has a sub-batch, or as many rows past the last."""
    by_pos = cdiv(x.P, tile["FB"]) if x.spatial and tile["UB"] == 1 else 1
    return by_pos * cdiv(x.U, tile["UB"]) * cdiv(x.N, x.n)


def plan(
    saved: Geometry, dx: Geometry, itemsize: int, settings: Settings | None = None
) -> tuple[Launch, tuple[int, ...]]:
    """Decide the launch, of ``dx.N`` rows, and its shape arguments; distances are in units of its alignment."""
    dx = dx._replace(spatial=saved.spatial)  # one unit alone is both, if its values lie one after another
    tile, warps, splits = settings or rule(saved, dx, itemsize)
    of_tile, total = (tile["NB"], dx.n) if dx.spatial else (tile["RB"] * tile["MB"], dx.M)
    rows = min(total, cdiv(tiles_of(dx, tile), splits) * of_tile)
    parts = cdiv(total, rows)
    grid = (programs_of(dx, tile) * parts,)
    if dx.spatial:
        UB, of_thread = tile["UB"], {"NB": tile["NB"], "FB": tile["FB"]}
        by, steps = aligned(run_steps(saved, UB))
        launch = Launch(apply_spatial, grid, {"ALIGNED": by, "SHARED": UB > 1, **of_thread}, warps, REGISTERS)
        return launch, (dx.N, dx.K, dx.n, dx.U, dx.P, *steps, rows, parts, UB, cdiv(dx.U, UB))
    by, steps = aligned(value_steps(saved))
    launch = Launch(apply_unit, grid, {"ALIGNED": by, "EVEN": even(saved), **tile}, warps, REGISTERS)
    return launch, (dx.N, dx.K, dx.n, dx.P, *steps, dx.M, rows, parts)

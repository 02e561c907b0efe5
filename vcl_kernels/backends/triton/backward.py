"""dx = dy · activation' + g · (scale · (x - mean) + shift): all that backward computes, in one pass.

A term without tensors is left out. Rows that take no part have no second term.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry
from .activations import activation_gradient
from .launch import RUN_TIME, WARPS, Launch, cdiv, power_of_2
from .tiles import as_runs, row_at, run_length, run_tile, unit_in_run

TILES = 4  # most tiles of a program, which reads its coefficients once
ROWS = 4  # of a tile in one thread
ELEMENTS = 8  # neighbouring elements of a row in one thread; half as many in float64
UNIT_WARPS = 4  # most of a program in the unit layout


class Tensors(NamedTuple):
    """What ``backward`` reads and writes."""

    saved: Tensor  # of x's size: x, or y where the derivative follows from it
    rows: Tensor | None  # x, of the rows that take part; None: ``saved`` is x
    dy: Tensor | None
    dx: Tensor
    mean: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    g: Tensor | None


@triton.jit(do_not_specialize=RUN_TIME)
def backward(  # noqa: PLR0913
    tensors, parameter: tl.float64,
    N, K, n, U, P, Q, x_sub_batch, x_sample, x_row, x_run, to_row, to_run, rows_of_part, parts, blocks, run_units,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, ACC: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program: a part of a sub-batch, or as many rows past the last, for a run or FB of its positions."""
    U = to_row.to(tl.int64) * T.aligned if T.run_kind == "units" else U  # so the compiler knows a divisor of U
    UB = T.UB if T.run_kind == "units" else run_units
    by_pos = tl.cdiv(P, T.FB) if T.run_kind == "alone" else 1
    pid = tl.program_id(0)
    of_pos = pid // by_pos
    of_block = of_pos // blocks
    block = (of_pos - of_block * blocks).to(tl.int64)
    k = of_block // parts
    begin = (of_block - k * parts).to(n.dtype) * rows_of_part
    k = k.to(tl.int64)
    end = tl.minimum(tl.minimum(begin + rows_of_part, n), N - k * n)
    if T.run_kind != "units":  # there 64 bits take fewer registers
        end = end.to(n.dtype)
    if T.run_kind == "units":  # a thread's columns are few units, whose coefficients it reads once
        i = tl.arange(0, T.NB)[:, None, None] * T.MB + tl.arange(0, T.MB)[None, :, None]
        column = tl.arange(0, T.UB)[None, None, :]
        unit = column
    else:
        i = tl.arange(0, T.NB)[:, None]
        column = ((pid - of_pos * by_pos).to(P.dtype) * T.FB + tl.arange(0, T.FB))[None, :]
        unit = unit_in_run(tl.arange(0, T.FB), P, T)
    valid = column < run_length(block, U, P, UB, T)
    saved_at = (k * x_sub_batch + block * x_run) * T.aligned + column
    dx_at = (k * n * to_row + block * to_run) * T.aligned + column
    if tensors.mean is not None:
        units = block * UB + unit
        at, of_loss = k * U + units, (units < U) & (k < K)
        mean = tl.load(tensors.mean + at, mask=of_loss, other=0.0)
        scale = tl.load(tensors.scale + at, mask=of_loss, other=0.0)
        shift = tl.zeros_like(scale)
        if tensors.shift is not None:
            shift = tl.load(tensors.shift + at, mask=of_loss, other=0.0)
        if tensors.g is not None:
            g = tl.load(tensors.g)
            scale *= g
            shift *= g
    for first in range(begin, end, T.NB * T.MB):
        row = first + i
        mask = (row < end) & valid
        from_at = saved_at + row_at(row, Q, x_sample, x_row, T)
        to_at = dx_at + row.to(tl.int64) * to_row * T.aligned
        dx = tl.zeros(mask.shape, ACC)
        if tensors.dy is not None:
            dx = tl.load(tensors.dy + to_at, mask=mask, other=0.0).to(ACC)
        if tensors.dy is not None and ACTIVATION != "identity":
            saved = tl.load(tensors.saved + from_at, mask=mask, other=0.0).to(ACC)
            dx = activation_gradient(saved, dx, parameter, ACTIVATION, FROM_OUTPUT)
        if tensors.mean is not None and k < K:
            if tensors.rows is not None:
                x = tl.load(tensors.rows + to_at, mask=mask, other=0.0).to(ACC)
            elif tensors.dy is not None and ACTIVATION != "identity":
                x = saved
            else:
                x = tl.load(tensors.saved + from_at, mask=mask, other=0.0).to(ACC)
            dx += scale * (x - mean)
            if tensors.shift is not None:
                dx += shift
        tl.store(tensors.dx + to_at, dx.to(tensors.dx.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=1024)
def plan(x: Geometry, itemsize: int) -> Launch:
    """Decide the launch, for what is read; all that is written is dense."""
    lanes = 32 * ELEMENTS // (2 if itemsize == 8 else 1)
    if x.spatial:
        UB, FB = run_tile(x, 256, 512, 512)
        # two rows of a run of one unit: the compiler would compute more side by side, in twice the registers
        NB = min(power_of_2(x.n), ROWS if itemsize == 2 and UB > 1 else ROWS // 2)
        tile, warps = {"NB": NB, "UB": UB, "FB": FB}, max(1, FB // lanes)
    else:
        NB = ROWS // 2 if x.M in (5, 6) else ROWS  # 5 or 6 rows are padded to 6, not to 8
        UB = min(power_of_2(x.U), 64 if x.M >= 64 else lanes)
        MB = min(power_of_2(cdiv(x.M, 2 * NB)), UNIT_WARPS * lanes // UB)
        tile, warps = {"NB": NB, "MB": MB, "UB": UB}, max(1, MB * UB // lanes)
    T, sizes = as_runs(x, tile)
    tiles = cdiv(sizes["n"], T.NB * T.MB)
    blocks, by_pos = cdiv(x.U, UB), cdiv(x.P, T.FB) if T.run_kind == "alone" else 1
    programs = cdiv(x.N, x.n) * blocks * by_pos
    wanted_parts = max(cdiv(tiles, TILES), min(tiles, cdiv(WARPS, programs * warps)))
    rows_of_part = min(sizes["n"], cdiv(tiles, wanted_parts) * T.NB * T.MB)
    parts = cdiv(sizes["n"], rows_of_part)
    sizes |= {"rows_of_part": rows_of_part, "parts": parts, "blocks": blocks, "run_units": UB}
    T = T._replace(UB=0) if x.spatial else T  # units with any number of positions share kernels
    return Launch(backward, (programs * parts,), sizes, {"T": T}, tile, warps)

"""Moments of sub-batches or, where these take too long for one program, of parts, which finalise merges.

The same pass over x can write y = activation(x), for all rows, and copy the rows that take part.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry
from .activations import activate
from .launch import RUN_TIME, WARPS, Launch, cdiv, power_of_2
from .tiles import SHRUNK, as_runs, by_unit, chan_merge, row_at, run_length, run_tile, unit_in_run

ROWS = 8  # of a tile in one thread: as many loads are in flight
TILES = 32  # most tiles of a program: each adds a rounding to its sums
FLOAT64 = 256  # values of a unit in a sub-batch. Up to this many, rounding errors do not average out: sum in float64
CANCELLED = tl.constexpr(8.0)  # largest Σ (x - pivot)² / m2 without a second pass; about 2 is expected
LARGE = tl.constexpr(2.0**100)  # least m2 that a pass over shrunk x is trusted with: no square underflowed


class Tensors(NamedTuple):
    """What ``moments`` reads and writes."""

    x: Tensor
    y: Tensor | None
    rows: Tensor | None  # a copy of the rows that take part
    partial: Tensor  # without parts, m2; else the means of parts, their m2, and how many values each part has
    mean: Tensor | None  # of each sub-batch, unless there are parts


@triton.jit(do_not_specialize=RUN_TIME)
def moments(  # noqa: PLR0913
    tensors, parameter: tl.float64,
    N, K, n, U, P, Q, x_sub_batch, x_sample, x_row, x_run, to_row, to_run, m2_offset, parts, tiles_of_part,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, SUMS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program: a block of units in a part. Each column of its tiles has its own sums, which are merged at the end.

    With an activation, further programs do a tile each of the rows past the last sub-batch.
    """
    HALF: tl.constexpr = tensors.x.dtype.element_ty.primitive_bitwidth == 16
    ALONE: tl.constexpr = T.run_kind == "alone"
    STEP: tl.constexpr = T.NB * T.MB
    FB: tl.constexpr = T.FB
    U = to_row.to(tl.int64) * T.aligned if T.run_kind == "units" else U  # so the compiler knows a divisor of U
    i = tl.arange(0, T.NB)[:, None] * T.MB
    f = tl.arange(0, FB)
    column = unit_in_run(f, P, T) if T.run_kind == "units" else f
    beside = f // T.UB if T.run_kind == "units" else 0
    blocks = tl.cdiv(U, T.UB).to(tl.int32)
    by_pos = tl.cdiv(P, FB) if ALONE else 1
    pid = tl.program_id(0)
    if pid < blocks * K * parts:
        of_part, part = pid, 0 * pid
        if parts > 1:  # divisions are slow, and small sub-batches have no parts
            of_part = pid // parts
            part = pid - of_part * parts
        block = of_part // K
        k = of_part - block * K
        by_row = tl.cdiv(n, STEP)
        begin = (part * tiles_of_part).to(n.dtype)
        end = tl.minimum(begin + tiles_of_part, by_row * by_pos)
        length = run_length(block, U, P, T.UB, T)
        x_at = tensors.x + (k.to(tl.int64) * x_sub_batch + block.to(tl.int64) * x_run) * T.aligned
        to_at = (k.to(tl.int64) * n * to_row + block.to(tl.int64) * to_run) * T.aligned
        first, position = begin * STEP + beside, column
        if ALONE:
            first = begin % by_row * STEP
            position = (begin // by_row).to(P.dtype) * FB + f
        start_at = x_at + row_at(first, Q, x_sample, x_row, T) + position
        pivot = tl.load(start_at, mask=(first < n) & (position < length), other=0.0)
        count, inverse, values = counts(begin, end, parts, n, P, length, T)
        shrink, needs_pass, first_pass = tl.full([], 1.0, SUMS), True, True
        while needs_pass:
            total = tl.zeros([FB], SUMS)
            # in the unit layout a column has few elements, whose roundings would not average out
            squares = tl.zeros([FB], tl.float64 if T.run_kind == "units" else SUMS)
            less = pivot.to(SUMS) * shrink
            row, at, tile_at = first, position, start_at
            for t in range(begin, end):
                mask = (row < n - i) & (at < length)[None, :]
                unread = mask & ((i > 0) | (t > begin) | (not first_pass))
                # the order of these sums is the one that takes the fewest registers
                if T.even and T.MB > 1:  # where tiles are many, a step from the last takes fewer instructions
                    here = tile_at[None, :] + row_at(i, Q, x_sample, x_row, T)
                elif T.even and T.run_kind == "units":
                    of_tile = row_at(row, Q, x_sample, x_row, T) + at
                    here = x_at + (of_tile[None, :] + row_at(i, Q, x_sample, x_row, T))
                else:
                    here = x_at + (row_at(row + i, Q, x_sample, x_row, T) + at[None, :])
                if T.run_kind == "units":
                    to = (to_at + row.to(tl.int64) * to_row * T.aligned + at)[None, :]
                    to += i.to(tl.int64) * to_row * T.aligned
                else:
                    to = to_at + (row + i).to(tl.int64) * to_row * T.aligned + at[None, :]
                x = tl.load(here, mask=unread, other=pivot[None, :])
                if ACTIVATION is not None:
                    y = activate(x.to(ACC), parameter, ACTIVATION, HALF)
                    tl.store(tensors.y + to, y.to(tensors.y.dtype.element_ty), mask=mask)
                if tensors.rows is not None:
                    tl.store(tensors.rows + to, x, mask=mask)
                d = x.to(SUMS) * shrink - less[None, :]
                total += tl.sum(d, 0)
                squares += tl.sum(d * d, 0).to(squares.dtype)
                row += STEP
                tile_at += x_row.to(tl.int64) * (STEP * T.aligned)
                if ALONE:
                    at += tl.where(row < n, 0, FB)
                    row = tl.where(row < n, row, 0)
            column_mean, m2, squares = moments_of_columns(pivot, total, squares, inverse, shrink)
            # a second pass takes the means, in x's dtype, as pivots, where sums were finite
            pivot = tl.where(tl.abs(column_mean) < float("inf"), column_mean.to(ACC).to(pivot.dtype), pivot)
            column_mean, m2, squares = columns(column_mean, P, T), columns(m2, P, T), columns(squares, P, T)
            if T.run_kind == "shared":
                m2, squares = tl.where(count > 0, m2, 0.0), tl.where(count > 0, squares, 0.0)
            mean, m2 = chan_merge(column_mean, m2, count, values, 0, ACC)
            units = block.to(tl.int64) * T.UB + tl.arange(0, T.UB)
            # a pass over shrunk x stores m2 only where it is so large that no square underflowed, or NaN
            least = tl.where(shrink < 1.0, tl.full([], LARGE, tl.float64), float("-inf"))
            valid = (units < U) & ((m2 > least) | (m2 != m2))
            at = (part.to(tl.int64) * K + k) * U + units
            store_moments(tensors, at, valid, m2_offset, mean, m2, values, pid, parts)
            shrink, needs_pass = next_pass(m2, tl.sum(squares, 0), first_pass, SUMS, tensors.x.dtype.element_ty)
            first_pass = False
    elif ACTIVATION is not None:
        t = pid - blocks * K * parts
        of_pos = t // by_pos
        block = of_pos % blocks
        past = (of_pos // blocks).to(tl.int64) * STEP + i
        if T.run_kind == "units":
            past += beside[None, :]  # type: ignore[index]
        if ALONE:
            column = (t - of_pos * by_pos).to(P.dtype) * FB + f
        mask = (past < N - K.to(tl.int64) * n) & (column < run_length(block, U, P, T.UB, T))[None, :]
        here = (K.to(tl.int64) * x_sub_batch + block.to(tl.int64) * x_run) * T.aligned + column[None, :]
        to = ((K.to(tl.int64) * n + past) * to_row + block.to(tl.int64) * to_run) * T.aligned + column[None, :]
        x = tl.load(tensors.x + here + row_at(past, Q, x_sample, x_row, T), mask=mask, other=0.0).to(ACC)
        tl.store(tensors.y + to, activate(x, parameter, ACTIVATION, HALF).to(tensors.y.dtype.element_ty), mask=mask)


@triton.jit
def counts(begin, end, parts, n, P, length, T: tl.constexpr):
    """Of tiles [begin, end): values in each column [FB // UB, UB or 1], 1 / that [FB or 1], and values of a unit."""
    STEP: tl.constexpr = T.NB * T.MB
    COLUMNS: tl.constexpr = T.FB // T.UB
    if T.run_kind == "units":
        below = tl.minimum(tl.cdiv(n - tl.arange(0, T.MB)[:, None], T.MB), end * T.NB) - begin * T.NB
        count = tl.maximum(below, 0)
        inverse = tl.broadcast_to(1.0 / tl.maximum(count, 1).to(tl.float64), [T.MB, T.UB])
        return count, tl.reshape(inverse, [T.FB]), (tl.minimum(n, end * STEP) - begin * STEP).to(tl.float64)
    else:
        # tiles run down all rows at one block of positions, then at the next: every element has ``before`` rows, and
        # those inside the last block have ``in_last`` more
        by_row = tl.cdiv(n, STEP)
        by_pos = tl.cdiv(P, T.FB) if T.run_kind == "alone" else 1
        in_last, before = n, n * (by_pos - 1)
        if parts > 1:
            last = tl.maximum(begin, (by_pos - 1) * by_row)
            in_last = tl.maximum(rows_before(end, by_row, n, STEP) - rows_before(last, by_row, n, STEP), 0)
            before = rows_before(end, by_row, n, STEP) - rows_before(begin, by_row, n, STEP) - in_last
        inside = length - (by_pos - 1) * T.FB if T.run_kind == "alone" else P
        inverse = 1.0 / tl.maximum(before + in_last, 1).to(tl.float64)
        if T.run_kind == "alone":
            inverse_before = 1.0 / tl.maximum(before, 1).to(tl.float64)
            inverse = tl.where(tl.arange(0, T.FB) < inside, inverse, inverse_before)
        count = before + tl.where(tl.arange(0, COLUMNS)[:, None] < inside, in_last, 0)
        return count, inverse, in_last.to(tl.float64) * inside + before.to(tl.float64) * T.FB


@triton.jit
def rows_before(tile, by_row, n, STEP: tl.constexpr):
    """Rows of tiles before ``tile``: of n rows at each position, STEP at a time."""
    return tile // by_row * n + tile % by_row * STEP


@triton.jit
def columns(a, P, T: tl.constexpr):
    """Values of the columns of a tile [FB] as [FB // UB, UB]: by unit."""
    return tl.reshape(by_unit(a, P, 1, T), [T.FB // T.UB, T.UB])


@triton.jit
def moments_of_columns(pivot, total, squares, inverse, shrink):
    """Mean and m2 of columns, from their sums of d = shrink · (x - pivot) and of d²; and Σ (x - pivot)².

    ``inverse`` is 1 / the number of values. Few digits cancel where the pivot is one of the values and no outlier.
    Where d² passes float32's range, m2 is infinite.
    """
    grow = 1.0 / shrink.to(tl.float64)
    total, squares = total.to(tl.float64), squares.to(tl.float64)
    mean = total * inverse
    m2 = tl.where(squares < float("inf"), squares - mean * total, squares) * (grow * grow)
    return pivot.to(tl.float64) + mean * grow, m2, squares * (grow * grow)


@triton.jit
def next_pass(m2, squares, first_pass, SUMS: tl.constexpr, OF_X: tl.constexpr):
    """The factor of x in a second pass, and whether one is needed.

    One is where a square overflowed float32, or where the pivot was an outlier: nearly all of Σ (x - pivot)² cancelled.
    """
    shrink = tl.full([], 1.0, SUMS)
    if tl.float32 == SUMS:
        shrink = tl.where(tl.max(m2, 0) == float("inf"), SHRUNK, shrink)
    if tl.float32 == SUMS or tl.float64 == OF_X:
        lost = tl.max(tl.where(squares > m2 * CANCELLED, 1.0, 0.0), 0) > 0.0
        return shrink, first_pass & (lost | (shrink != 1.0))
    else:
        return shrink, False


@triton.jit
def store_moments(tensors, at, valid, m2_offset, mean, m2, values, pid, parts):
    """Store m2 and, for parts or where it is wanted, the mean; and how many values each part has."""
    tl.store(tensors.partial + m2_offset + at, m2, mask=valid)
    if parts > 1:
        tl.store(tensors.partial + at, mean, mask=valid)
        if pid < parts:  # the first unit and sub-batch: every one has the same parts
            tl.store(tensors.partial + m2_offset + m2_offset + pid + tl.arange(0, 1), values)
    elif tensors.mean is not None:
        tl.store(tensors.mean + at, mean.to(tensors.mean.dtype.element_ty), mask=valid)


def m2_offset(x: Geometry, parts: int) -> int:
    """Return where m2 begins in ``partial``, after the means; counts begin at twice that. 0 without parts."""
    return 0 if parts == 1 else parts * x.K * x.U


def partial_size(x: Geometry, parts: int) -> int:
    """Return the size of ``partial``: m2 of each sub-batch, or means and m2 of parts, and a count for each part."""
    return x.K * x.U if parts == 1 else 2 * m2_offset(x, parts) + parts


@functools.lru_cache(maxsize=1024)
def plan(x: Geometry, itemsize: int, activates: bool, keep_rows: bool = False) -> Launch:
    """Decide the launch. Its sizes say how many ``parts`` a sub-batch has.

    ``activates``: it writes y, of all rows. ``keep_rows``: it copies the rows of x that take part.
    """
    writes = activates or keep_rows
    rows = ROWS // 2 if writes else ROWS  # what is written takes registers
    columns_of_thread = 2 if itemsize == 8 else 4  # neighbours, of 8 or 16 bytes
    lanes = 32 * columns_of_thread
    if x.spatial:
        UB, FB = run_tile(x, 64, 2 * lanes, lanes)
        NB = min(power_of_2(x.n), 2 if writes and x.n in (5, 6) else rows)  # 5 or 6 rows are padded to 6, not to 8
        tile = {"NB": NB, "UB": UB, "FB": FB}
        warps = 1 if UB == 1 else max(2, FB // lanes)  # what warps exchange goes by shared memory
    else:
        NB, one_thread = min(power_of_2(x.M), rows), x.M <= ROWS
        UB = min(power_of_2(x.U), lanes if one_thread else 128 // itemsize)
        MB = 1 if one_thread else min(power_of_2(cdiv(x.M, NB)), (1 if x.M <= FLOAT64 else 4) * lanes // UB)
        tile, warps = {"NB": NB, "MB": MB, "UB": UB}, max(1, MB * UB // lanes)
    # in the unit layout sums of more columns take too many registers
    T, sizes = as_runs(x, tile, 16 if x.spatial else columns_of_thread)
    blocks, by_pos = cdiv(x.U, UB), cdiv(x.P, T.FB) if T.run_kind == "alone" else 1
    past = sizes["N"] - x.K * sizes["n"] if activates else 0
    tiles, tiles_past = (cdiv(rows, T.NB * T.MB) * by_pos for rows in (sizes["n"], past))
    # merging a part costs a tile: at least two tiles a part, unless a GPU would be idle
    idle = T.run_kind == "units" and x.M > FLOAT64 and blocks * x.K * tiles * warps <= WARPS // 4
    most_parts = tiles if idle else max(1, tiles // 2)
    wanted_parts = max(1, min(most_parts, WARPS // (blocks * x.K * warps)), cdiv(tiles, TILES))
    tiles_of_part = cdiv(tiles, wanted_parts)
    parts = cdiv(tiles, tiles_of_part)
    sizes |= {"m2_offset": m2_offset(x, parts), "parts": parts, "tiles_of_part": tiles_of_part}
    sums = tl.float64 if itemsize == 8 or x.M <= FLOAT64 else tl.float32
    return Launch(moments, (blocks * (x.K * parts + tiles_past),), sizes, {"T": T, "SUMS": sums}, tile, warps)

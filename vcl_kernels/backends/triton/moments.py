"""Moments of sub-batches, and of parts of those that take too long for one program, for finalise to merge.

With an activation, the same pass over x also writes y, for all rows, and keeps the rows that take part.
"""

import functools

import triton
import triton.language as tl

from ...geometry import Geometry
from .activations import activate
from .launch import RUN_TIME, WARPS, Launch, Settings, aligned, cdiv, even, power_of_2
from .runs import by_unit, run_length, run_steps, run_tile, value_steps

ROWS = 8  # of a tile, which one thread has: as many loads are on their way at once
TILES = 32  # of a program at most: roundings of its sums grow with each
FEW = 256  # values of a unit in a sub-batch: up to so many, rounding errors do not average out, and sums are float64
CANCELLED = tl.constexpr(8.0)  # times its Σ (x - mean)² that a unit's Σ (x - pivot)² may be; about 2 is to be expected
LARGE = tl.constexpr(2.0**100)  # m2 of values that may have been past float32's range, and that SHRUNK are not below it
SHRUNK = tl.constexpr(2.0**-80)  # so that squares of the largest values of float32 are within its range


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
    P,
    x_row,
    x_step,
    to_row,
    to_step,
    plane,
    splits,
    tiles_per_split,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # or None: moments alone
    ACC: tl.constexpr,
    SUMS: tl.constexpr,
    NB: tl.constexpr,
    UB: tl.constexpr,
    FB: tl.constexpr,
):
    """Program (units, sub-batch, split): tiles [row, element of a run], a run being what UB units have of a row.

    Each element of the run has sums of its own, over rows. They are merged at the end. With an activation, programs
    after those do a tile each of the rows past the last sub-batch.
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    i = tl.arange(0, NB)[:, None]
    f = tl.arange(0, FB)
    groups = tl.cdiv(U, UB)
    by_pos = tl.cdiv(P, FB) if UB == 1 else 1
    pid = tl.program_id(0)
    if pid < groups * K * splits:
        split, k, group = part_of(pid, K, splits)
        by_row = tl.cdiv(n, NB)
        begin = split * tiles_per_split
        end = tl.minimum(begin + tiles_per_split, by_row * by_pos)
        length = run_length(group, U, P, UB, ALIGNED)
        x_at = x_ptr + (k.to(tl.int64) * n * x_row + group.to(tl.int64) * x_step) * ALIGNED
        of_k = (k.to(tl.int64) * n * to_row + group.to(tl.int64) * to_step) * ALIGNED
        # rows that the last elements of a unit have, and those that others have besides
        in_last, before = n, n * (by_pos - 1)
        if splits > 1:
            last = tl.maximum(begin, (by_pos - 1) * by_row)
            in_last = tl.maximum(rows_before(end, by_row, n, NB) - rows_before(last, by_row, n, NB), 0)
            before = rows_before(end, by_row, n, NB) - rows_before(begin, by_row, n, NB) - in_last
        inside = length - (by_pos - 1) * FB if UB == 1 else P
        values = in_last.to(tl.float64) * inside + before.to(tl.float64) * FB
        start = (begin // by_row).to(P.dtype) * FB + f
        start_at = x_at + (begin % by_row * NB).to(tl.int64) * x_row * ALIGNED + start
        pivot = tl.load(start_at, mask=start < length, other=0.0)
        shrink, again, first_pass = tl.full([], 1.0, SUMS), True, True
        while again:
            total = tl.zeros([FB], SUMS)
            squares = tl.zeros([FB], SUMS)
            less = pivot.to(SUMS) * shrink
            of_tile, position = begin % by_row * NB, start
            for t in range(begin, end):
                sample = of_tile + i
                mask = (sample < n) & (position < length)[None, :]
                unread = mask & ((i > 0) | (t > begin) | (not first_pass))
                here = x_at + sample.to(tl.int64) * x_row * ALIGNED + position[None, :]
                x = tl.load(here, mask=unread, other=pivot[None, :])
                to = of_k + sample.to(tl.int64) * to_row * ALIGNED + position[None, :]
                if ACTIVATION is not None:
                    y = activate(x.to(ACC), parameter, ACTIVATION, HALF)
                    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=mask)
                if rows_ptr is not None:
                    tl.store(rows_ptr + to, x, mask=mask)
                d = x.to(SUMS) * shrink - less[None, :]
                total += tl.sum(d, 0)
                squares += tl.sum(d * d, 0)
                of_tile += NB
                position += tl.where(of_tile < n, 0, FB)
                of_tile = tl.where(of_tile < n, of_tile, 0)
            inverse = 1.0 / tl.maximum(before + in_last, 1).to(tl.float64)
            inverse_before = 1.0 / tl.maximum(before, 1).to(tl.float64)
            inverse_of = tl.where(f < inside, inverse, inverse_before) if UB == 1 else inverse
            own, own_m2, squares = own_moments(pivot, total, squares, inverse_of, shrink)
            pivot = nearer(own, pivot, ACC)
            own, own_m2, squares = columns(own, P, UB, FB), columns(own_m2, P, UB, FB), columns(squares, P, UB, FB)
            there = tl.arange(0, FB // UB)[:, None] < inside
            if UB > 1:
                own_m2, squares = tl.where(there, own_m2, 0.0), tl.where(there, squares, 0.0)
            count = before + tl.where(there, in_last, 0)
            mean, m2 = merged(own, own_m2, count, values, 0, ACC)
            units = group.to(tl.int64) * UB + tl.arange(0, UB)
            at = (split.to(tl.int64) * K + k) * U + units
            store_moments(
                partial_ptr, mean_ptr, at, plane, (units < U) & found(m2, shrink), mean, m2, values, pid, splits
            )
            shrink, again = next_pass(m2, tl.sum(squares, 0), first_pass, SUMS, x_ptr.dtype.element_ty)
            first_pass = False
    elif ACTIVATION is not None:
        t = pid - groups * K * splits
        of_rows = t // by_pos
        group = of_rows % groups
        row = K.to(tl.int64) * n + (of_rows // groups).to(tl.int64) * NB + i
        position = ((t - of_rows * by_pos).to(P.dtype) * FB + f)[None, :]
        mask = (row < N) & (position < run_length(group, U, P, UB, ALIGNED))
        here = (row * x_row + group.to(tl.int64) * x_step) * ALIGNED + position
        to = (row * to_row + group.to(tl.int64) * to_step) * ALIGNED + position
        x = tl.load(x_ptr + here, mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + to, activate(x, parameter, ACTIVATION, HALF).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def columns(a, P, UB: tl.constexpr, FB: tl.constexpr):
    """[FB // UB, UB] of the elements of a run [FB]."""
    return tl.reshape(by_unit(a, P, 1, UB, FB), [FB // UB, UB])


@triton.jit
def rows_before(tile, by_row, n, NB: tl.constexpr):
    """Rows of tiles before ``tile``: of n rows at each position, NB at a time."""
    return tile // by_row * n + tile % by_row * NB


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
    P,
    x_row,
    x_pos,
    to_pos,
    M,
    plane,
    splits,
    tiles_per_split,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,  # or None: moments alone
    ACC: tl.constexpr,
    SUMS: tl.constexpr,
    RB: tl.constexpr,
    MB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program (units, sub-batch, split): likewise with tiles [RB, MB · UB] of RB · MB values, of UB units each.

    EVEN: values lie one distance apart, across rows too. They do in y and in the rows that are kept.
    """
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    STEP: tl.constexpr = RB * MB
    U = to_pos.to(tl.int64) * ALIGNED
    r = tl.arange(0, RB)[:, None]
    e = tl.arange(0, MB * UB)
    m = e // UB
    blocks = tl.cdiv(U, UB).to(tl.int32)
    pid = tl.program_id(0)
    if pid < blocks * K * splits:
        split, k, block = part_of(pid, K, splits)
        units = block.to(tl.int64) * UB + tl.arange(0, UB)
        u = block.to(tl.int64) * UB + e % UB
        valid = u < U
        begin = (split * tiles_per_split).to(M.dtype)
        end = tl.minimum(begin + tiles_per_split, tl.cdiv(M, STEP))
        x_at = x_ptr + k.to(tl.int64) * n * x_row * ALIGNED
        of_k = k.to(tl.int64) * M * to_pos * ALIGNED
        seen = tl.minimum(tl.cdiv(M - tl.arange(0, MB)[:, None], MB), end * RB) - begin * RB
        count = tl.maximum(seen, 0)
        values = (tl.minimum(M, end * STEP) - begin * STEP).to(tl.float64)
        m_first = begin * STEP + m
        start_at = x_at + value_at(m_first, P, x_row, x_pos, EVEN) * ALIGNED + u
        pivot = tl.load(start_at, mask=(m_first < M) & valid, other=0.0)
        shrink, again, first_pass = tl.full([], 1.0, SUMS), True, True
        while again:
            total = tl.zeros([MB * UB], SUMS)
            squares = tl.zeros([MB * UB], tl.float64)  # of few elements: their roundings would not average out
            less = pivot.to(SUMS) * shrink
            value = m_first[None, :]
            x_first = start_at[None, :]
            to_first = of_k + value.to(tl.int64) * to_pos * ALIGNED + u[None, :]
            for t in range(begin, end):
                mask = (value < M - r * MB) & valid[None, :]
                unread = mask & ((r > 0) | (t > begin) | (not first_pass))
                if EVEN:
                    here = x_first + r.to(tl.int64) * x_pos * (MB * ALIGNED)
                    x_first += x_pos.to(tl.int64) * (STEP * ALIGNED)
                else:
                    here = x_at + value_at(value + r * MB, P, x_row, x_pos, EVEN) * ALIGNED + u[None, :]
                x = tl.load(here, mask=unread, other=pivot[None, :])
                to = to_first + r.to(tl.int64) * to_pos * (MB * ALIGNED)
                if ACTIVATION is not None:
                    y = activate(x.to(ACC), parameter, ACTIVATION, HALF)
                    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=mask)
                if rows_ptr is not None:
                    tl.store(rows_ptr + to, x, mask=mask)
                value += STEP
                to_first += to_pos.to(tl.int64) * (STEP * ALIGNED)
                d = x.to(SUMS) * shrink - less[None, :]
                total += tl.sum(d, 0)
                squares += tl.sum(d * d, 0).to(tl.float64)
            inverse = tl.broadcast_to(1.0 / tl.maximum(count, 1).to(tl.float64), [MB, UB])
            own, own_m2, squares = own_moments(pivot, total, squares, tl.reshape(inverse, [MB * UB]), shrink)
            pivot = nearer(own, pivot, ACC)
            own, own_m2 = tl.reshape(own, [MB, UB]), tl.reshape(own_m2, [MB, UB])
            squares = tl.reshape(squares, [MB, UB])
            mean, m2 = merged(own, own_m2, count, values, 0, ACC)
            at = (split.to(tl.int64) * K + k) * U + units
            store_moments(
                partial_ptr, mean_ptr, at, plane, (units < U) & found(m2, shrink), mean, m2, values, pid, splits
            )
            shrink, again = next_pass(m2, tl.sum(squares, 0), first_pass, SUMS, x_ptr.dtype.element_ty)
            first_pass = False
    elif ACTIVATION is not None:
        t = pid - blocks * K * splits
        u = (t % blocks).to(tl.int64) * UB + e % UB
        value = (t // blocks).to(tl.int64) * STEP + r * MB + m[None, :]
        mask = (value < (N - K.to(tl.int64) * n) * P) & (u < U)[None, :]
        here = K.to(tl.int64) * n * x_row + value_at(value, P, x_row, x_pos, EVEN)
        to = (K.to(tl.int64) * n * P + value) * to_pos * ALIGNED + u[None, :]
        x = tl.load(x_ptr + here * ALIGNED + u[None, :], mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + to, activate(x, parameter, ACTIVATION, HALF).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def value_at(value, P, x_row, x_pos, EVEN: tl.constexpr):
    """Where a value of a unit lies, counted from the row of value 0: it is at position value % P of a row."""
    if EVEN:
        return value.to(tl.int64) * x_pos
    else:
        row = value // P
        return row.to(tl.int64) * x_row + (value - row * P).to(tl.int64) * x_pos


@triton.jit
def part_of(pid, K, splits):
    """Which split, sub-batch and units a program has."""
    split = 0 * pid
    k = pid
    if splits > 1:
        k = pid // splits
        split = pid - k * splits
    block = k // K
    return split, k - block * K, block


@triton.jit
def own_moments(pivot, total, squares, inverse, shrink):
    """Mean and Σ (x - mean)² of an element, of its sums of d = shrink · (x - pivot) and of d²; and Σ (x - pivot)².

    Few digits cancel where the pivot is one of its 1 / ``inverse`` values and no outlier. d² past float32's range give
    an infinite m2.
    """
    grow = 1.0 / shrink.to(tl.float64)
    total, squares = total.to(tl.float64), squares.to(tl.float64)
    mean = total * inverse
    m2 = tl.where(squares < float("inf"), squares - mean * total, squares) * (grow * grow)
    return pivot.to(tl.float64) + mean * grow, m2, squares * (grow * grow)


@triton.jit
def merged(mean, m2, count, values, AXIS: tl.constexpr, ACC: tl.constexpr):
    """Mean and Σ (x - mean)² of all elements along ``AXIS`` (Chan et al.), which have ``values`` in all.

    Of equal means it is that mean: sums of float32 values are exact here, those of float64 are corrected.
    """
    count = count.to(tl.float64)
    centre = tl.sum(count * mean, AXIS, keep_dims=True) / values
    d = mean - centre
    if tl.float64 == ACC:
        error = tl.sum(count * d, AXIS, keep_dims=True) / values
        centre += error
        d -= error
    return tl.sum(centre, AXIS), tl.sum(m2.to(tl.float64) + count * (d * d), AXIS)


@triton.jit
def nearer(own, pivot, ACC: tl.constexpr):
    """The pivot of a second pass: an element's mean, if its sums had one, as x is rounded."""
    return tl.where(tl.abs(own) < float("inf"), own.to(ACC).to(pivot.dtype), pivot)


@triton.jit
def found(m2, shrink):
    """Whether a pass has found m2: of shrunk x where it is so large that no square was below the range. Of NaN too."""
    least = tl.where(shrink < 1.0, tl.full([], LARGE, tl.float64), float("-inf"))
    return (m2 > least) | (m2 != m2)


@triton.jit
def next_pass(m2, squares, first_pass, SUMS: tl.constexpr, OF_X: tl.constexpr):
    """What x is multiplied by in a second pass, and whether one is needed.

    It is where squares were past float32's range, and where pivots were outliers: of Σ (x - pivot)² nearly all cancels.
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
def store_moments(partial_ptr, mean_ptr, at, plane, valid, mean, m2, values, pid, splits):
    """Store mean and m2: of a whole sub-batch where they are wanted; of a part of it in two planes, then its values."""
    tl.store(partial_ptr + plane + at, m2, mask=valid)
    if splits > 1:
        tl.store(partial_ptr + at, mean, mask=valid)
        if pid < splits:  # the first of a split: they are the same for every unit and sub-batch
            tl.store(partial_ptr + plane + plane + pid + tl.arange(0, 1), values)
    elif mean_ptr is not None:
        tl.store(mean_ptr + at, mean.to(mean_ptr.dtype.element_ty), mask=valid)


@functools.lru_cache(maxsize=1024)
def rule(x: Geometry, writes: bool, itemsize: int) -> Settings:
    """Choose settings. What is written takes registers: a thread has fewer rows."""
    rows = ROWS // 2 if writes else ROWS
    lanes = 32 * elements_of_thread(itemsize)
    if x.spatial:
        UB, FB = run_tile(x, 64, 2 * lanes, (lanes, lanes))
        NB = min(power_of_2(x.n), 2 if writes and x.n in (5, 6) else rows)  # of which 6 are covered with less
        tile = {"NB": NB, "UB": UB, "FB": FB}
        warps = 1 if UB == 1 else max(2, FB // lanes)  # what warps exchange goes by shared memory
    else:
        RB, few = min(power_of_2(x.M), rows), x.M <= ROWS
        UB = min(power_of_2(x.U), lanes if few else 128 // itemsize)
        MB = 1 if few else min(power_of_2(cdiv(x.M, RB)), (1 if x.M <= FEW else 4) * lanes // UB)
        tile, warps = {"RB": RB, "MB": MB, "UB": UB}, max(1, MB * UB // lanes)
    return Settings(tile, warps, max(1, WARPS // (cdiv(x.U, tile["UB"]) * x.K * warps)))


def elements_of_thread(itemsize: int) -> int:
    """Return how many neighbouring elements of a row a thread has sums of: those of 8 or 16 bytes."""
    return 2 if itemsize == 8 else 4


def sums_in_float64(x: Geometry, itemsize: int) -> bool:
    """Whether a sub-batch has so few values of a unit that their rounding errors do not average out."""
    return itemsize == 8 or x.M <= FEW


def plane(x: Geometry, splits: int) -> int:
    """Return the distance between what is kept of parts: mean, m2, and then their counts."""
    return 0 if splits == 1 else splits * x.K * x.U


def partial_size(x: Geometry, splits: int) -> int:
    """Return how many values are kept: m2 of each sub-batch, or of parts two planes and a count for each split."""
    return x.K * x.U if splits == 1 else 2 * plane(x, splits) + splits


def plan(
    x: Geometry, activates: bool, itemsize: int, settings: Settings | None = None, *, keeps: bool = False
) -> tuple[Launch, tuple[int, ...], int]:
    """Decide the launch, its shape arguments (distances in units of its alignment) and how many parts a sub-batch has.

    ``activates``: it writes y, of all rows. ``keeps``: it writes the rows of x that take part.
    """
    tile, warps, splits = settings or rule(x, activates or keeps, itemsize)
    rest = x.N - x.K * x.n if activates else 0
    if x.spatial:
        by_pos = cdiv(x.P, tile["FB"]) if tile["UB"] == 1 else 1
        tiles, rest_tiles = cdiv(x.n, tile["NB"]) * by_pos, cdiv(rest, tile["NB"]) * by_pos
    else:
        step = tile["RB"] * tile["MB"]
        tiles, rest_tiles = cdiv(x.M, step), cdiv(rest * x.P, step)
    # merging takes as long as a tile: two in each split, but where a GPU would be idle
    idle = not x.spatial and x.M > FEW and cdiv(x.U, tile["UB"]) * x.K * tiles * warps <= WARPS // 4
    splits = min(tiles if idle else max(1, tiles // 2), splits)
    per_split = cdiv(tiles, max(splits, cdiv(tiles, TILES)))
    splits = cdiv(tiles, per_split)
    grid = (cdiv(x.U, tile["UB"]) * (x.K * splits + rest_tiles),)
    constants = {**tile, "SUMS": tl.float64 if sums_in_float64(x, itemsize) else tl.float32}
    parts = plane(x, splits), splits, per_split
    if x.spatial:
        by, steps = aligned(run_steps(x, tile["UB"]))
        launch = Launch(moments_spatial, grid, {"ALIGNED": by, **constants}, warps)
        return launch, (x.N, x.K, x.n, x.U, x.P, *steps, *parts), splits
    # sums of more columns take too many registers
    by, steps = aligned(value_steps(x), elements_of_thread(itemsize))
    launch = Launch(moments_unit, grid, {"ALIGNED": by, "EVEN": even(x), **constants}, warps)
    return launch, (x.N, x.K, x.n, x.P, *steps, x.M, *parts), splits

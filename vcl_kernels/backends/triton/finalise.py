"""From moments to variance, loss and coefficients: one small kernel, which merges those of parts in a fixed order."""

import functools

import triton
import triton.language as tl

from ...geometry import Geometry
from .formulas import coefficients
from .launch import RUN_TIME, Launch, Settings, cdiv, power_of_2, warps_for
from .moments import plane

ONE_PROGRAM = 2048  # values (split, K, units) of a tile of 16 warps, in float64: more would take too many registers
SEVERAL = 128  # of a tile of one of several programs
READ_BY_ONE = 16384  # values (split, K, U): up to so many, one program also sums over units, which saves a launch


@triton.jit(do_not_specialize=RUN_TIME)
def finalise(
    partial_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    loss_ptr,
    dbeta_ptr,
    beta_ptr,
    beta_value: "fp64",  # noqa: F821
    beta_min: "fp64",  # noqa: F821
    factor: "fp64",  # noqa: F821
    K,
    M,
    U,
    plane,
    splits,
    FORM: tl.constexpr,  # or None: moments alone
    BETA: tl.constexpr,
    REDUCE: tl.constexpr,
    ACC: tl.constexpr,
    SB: tl.constexpr,
    KB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program: UB units at a time, all sub-batches, SB splits at a time. REDUCE: it is the only one, and adds units.

    Where nothing was split there is m2 alone to read, and the means are where they belong.
    """
    first = tl.program_id(0).to(tl.int64) * UB
    end = U if REDUCE else tl.minimum(first + UB, U)
    k = tl.arange(0, KB)[:, None]
    s = tl.arange(0, SB)[:, None, None]
    total = tl.zeros([UB], tl.float64)
    total_dbeta = tl.zeros([UB], tl.float64)
    for block in range(first, end, UB):
        units = block + tl.arange(0, UB)
        mask = (k < K) & (units[None, :] < U)
        out = k.to(tl.int64) * U + units[None, :]
        m2 = tl.load(partial_ptr + plane + out, mask=mask, other=0.0)
        if splits > 1:
            # parts in two planes, mean and m2, and then how many values each has; means are counted off one of them
            one = tl.load(partial_ptr + out, mask=mask, other=0.0)
            mean = tl.zeros([KB, UB], tl.float64)
            for start in range(0, splits, SB):
                here, there, count = parts_at(partial_ptr, start + s, splits, plane, K.to(tl.int64) * U, out, mask)
                d = tl.load(here, mask=there, other=0.0) - one[None, :, :]
                mean += tl.sum(tl.where(there, count * d, 0.0), 0)
            mean = one + mean * (1.0 / tl.full([], M, tl.float64))
            m2 = tl.zeros([KB, UB], tl.float64)
            for start in range(0, splits, SB):
                here, there, count = parts_at(partial_ptr, start + s, splits, plane, K.to(tl.int64) * U, out, mask)
                d = tl.load(here, mask=there, other=0.0) - mean[None, :, :]
                m2 += tl.sum(count * (d * d) + tl.load(here + plane, mask=there, other=0.0), 0)
            if mean_ptr is not None:
                tl.store(mean_ptr + out, mean.to(ACC), mask=mask)
        if FORM is None:
            tl.store(var_ptr + out, (m2 * (1.0 / tl.full([], M - 1, tl.float64))).to(ACC), mask=mask)
        else:
            loss, scale, dbeta = coefficients(
                m2, k, K, M, units, units < U, beta_ptr, beta_value, beta_min, factor, FORM, BETA, ACC, KB, UB
            )
            if scale_ptr is not None:
                tl.store(scale_ptr + out, scale, mask=mask)
            if REDUCE:
                total += tl.where(units < U, loss, 0.0)
            else:
                tl.store(loss_ptr + units, loss, mask=units < U)
            if dbeta_ptr is not None:
                if REDUCE and BETA == 1:
                    total_dbeta += tl.where(units < U, dbeta, 0.0)
                else:
                    tl.store(dbeta_ptr + units, dbeta, mask=units < U)
    if REDUCE:
        tl.store(loss_ptr, tl.sum(total, 0))
        if dbeta_ptr is not None and BETA == 1:
            tl.store(dbeta_ptr, tl.sum(total_dbeta, 0))


@triton.jit
def parts_at(partial_ptr, split, splits, plane, of_split, out, mask):
    """Where some splits have their means, which of those are there, and how many values each split has."""
    there = split < splits
    count = tl.load(partial_ptr + plane + plane + split, mask=there, other=0.0)
    return partial_ptr + out[None, :, :] + split.to(tl.int64) * of_split, mask[None, :, :] & there, count


@functools.lru_cache(maxsize=1024)
def rule(x: Geometry, splits: int, reduce: bool) -> Settings:
    """Choose settings: one program where the sum over units is wanted and there is little to read, else several.

    Tiles depend on K alone: a network's layers share kernels.
    """
    KB = power_of_2(x.K)
    if reduce and KB * x.U * splits <= READ_BY_ONE:
        return Settings({"SB": 1, "KB": KB, "UB": max(1, ONE_PROGRAM // KB)}, 16)
    UB = max(4, SEVERAL // KB)  # 4 units of float64 are the least that memory moves
    SB = max(1, min(4, ONE_PROGRAM // (KB * UB)))
    return Settings({"SB": SB, "KB": KB, "UB": UB}, warps_for(64 * KB * UB), 2)


def plan(x: Geometry, splits: int, reduce: bool, settings: Settings | None = None) -> tuple[Launch, tuple[int, ...]]:
    """Decide the launch and its shape arguments.

    ``reduce``: wanted is the sum over units; REDUCE says whether the launch gives it.
    """
    tile, warps, programs = settings or rule(x, splits, reduce)
    one = reduce and programs == 1
    launch = Launch(finalise, (1 if one else cdiv(x.U, tile["UB"]),), {**tile, "REDUCE": one}, warps)
    return launch, (x.K, x.M, x.U, plane(x, splits), splits)

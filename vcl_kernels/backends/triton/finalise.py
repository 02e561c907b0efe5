"""From moments to variance, loss and coefficients: one small kernel, which merges those of parts in a fixed order."""

import functools

import triton
import triton.language as tl

from ...geometry import Geometry
from .formulas import coefficients
from .launch import RUN_TIME, Launch, Settings, cdiv, power_of_2, warps_for

ONE_PROGRAM = 2048  # values (K, U) that the threads of one program hold in registers, in float64
AT_ONCE = 512  # values (split, K, U) that it reads before it merges them
READ_BY_ONE = 16384  # such values that one program reads rather than that another launch adds the units


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
    WHOLE: tl.constexpr,
    SB: tl.constexpr,
    KB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program: UB units, all sub-batches, SB splits at a time. REDUCE: it is the only one, and sums over units too.

    WHOLE: nothing was split; there is m2 alone to read, and the means are where they belong.
    """
    units = tl.program_id(0).to(tl.int64) * UB + tl.arange(0, UB)
    k = tl.arange(0, KB)[:, None]
    mask = (k < K) & (units[None, :] < U)
    out = k.to(tl.int64) * U + units[None, :]
    if WHOLE:
        m2 = tl.load(partial_ptr + out, mask=mask, other=0.0)
    else:
        # the parts in three planes, mean - pilot, m2 and pilot, and then how many values each has
        mean = tl.zeros([KB, UB], tl.float64)
        m2 = tl.zeros([KB, UB], tl.float64)
        s = tl.arange(0, SB)[:, None, None]
        for start in range(0, splits, SB):
            here = partial_ptr + out[None, :, :] + (start + s).to(tl.int64) * (K * U)
            real = mask[None, :, :] & (start + s < splits)
            count = tl.load(partial_ptr + 3 * plane + start + s, mask=start + s < splits, other=0.0)
            mean += tl.sum(count * tl.load(here, mask=real, other=0.0), 0)
        mean *= 1.0 / tl.full([], M, tl.float64)
        for start in range(0, splits, SB):
            here = partial_ptr + out[None, :, :] + (start + s).to(tl.int64) * (K * U)
            real = mask[None, :, :] & (start + s < splits)
            count = tl.load(partial_ptr + 3 * plane + start + s, mask=start + s < splits, other=0.0)
            d = tl.load(here, mask=real, other=0.0) - mean[None, :, :]
            m2 += tl.sum(count * (d * d) + tl.load(here + plane, mask=real, other=0.0), 0)
        if mean_ptr is not None:
            pilot = tl.load(partial_ptr + 2 * plane + out, mask=mask, other=0.0)
            tl.store(mean_ptr + out, (pilot + mean).to(ACC), mask=mask)
    if FORM is None:
        tl.store(var_ptr + out, (m2 * (1.0 / tl.full([], M - 1, tl.float64))).to(ACC), mask=mask)
    else:
        loss, scale, dbeta = coefficients(
            m2, k, K, M, units, units < U, beta_ptr, beta_value, beta_min, factor, FORM, BETA, ACC, KB, UB
        )
        store_units(loss_ptr, loss, units, U, REDUCE)
        if scale_ptr is not None:
            tl.store(scale_ptr + out, scale, mask=mask)
        if dbeta_ptr is not None:
            store_units(dbeta_ptr, dbeta, units, U, REDUCE and BETA == 1)


@triton.jit
def store_units(ptr, value, units, U, REDUCE: tl.constexpr):
    """Store a value for each unit, or their sum."""
    if REDUCE:
        tl.store(ptr, tl.sum(tl.where(units < U, value, 0.0), 0))
    else:
        tl.store(ptr + units, value, mask=units < U)


def arguments(x: Geometry, splits: int) -> tuple[int, ...]:
    """Return the shape arguments."""
    return x.K, x.M, x.U, plane(x, splits), splits


def plane(x: Geometry, splits: int) -> int:
    """Return the distance between what is kept of parts: mean - pilot, m2, pilot, and then their counts."""
    return 0 if splits == 1 else splits * x.K * x.U


def partial_size(x: Geometry, splits: int) -> int:
    """Return how many values are read: m2 of each sub-batch, or of parts three planes and a count for each split."""
    return x.K * x.U if splits == 1 else 3 * plane(x, splits) + splits


@functools.lru_cache(maxsize=1024)
def rule(x: Geometry, splits: int, reduce: bool) -> Settings:
    """Choose settings: one program where its sum over units is wanted and there is little to read."""
    KB, UB = power_of_2(x.K), power_of_2(x.U)
    in_one = reduce and KB * UB <= ONE_PROGRAM and KB * UB * splits <= READ_BY_ONE
    if not in_one:
        few = 128 if splits == 1 else 16  # float64 takes many registers
        least = max(1, min(4, ONE_PROGRAM // KB))  # 4 units of float64 are the least that memory moves
        UB = min(UB, max(least, min(few, 8 * few // KB)))
    SB = min(power_of_2(splits), AT_ONCE // (KB * UB))
    SB = SB if SB >= 4 else 1
    return Settings({"SB": SB, "KB": KB, "UB": UB}, warps_for((8 if in_one else 16) * SB * KB * UB))


def plan(x: Geometry, splits: int, reduce: bool, settings: Settings | None = None) -> Launch:
    """Decide the launch. ``reduce``: wanted is the sum over units; REDUCE says whether the launch gives it."""
    tile, warps, _ = settings or rule(x, splits, reduce)
    programs = cdiv(x.U, tile["UB"])
    constants = {**tile, "REDUCE": reduce and programs == 1, "WHOLE": splits == 1}
    return Launch(finalise, (programs,), constants, warps)

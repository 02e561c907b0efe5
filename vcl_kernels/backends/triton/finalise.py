"""From partial moments to mean, variance, loss, coefficients: one small kernel, merging in a fixed order."""

import triton
import triton.language as tl

from ...geometry import Geometry
from .formulas import coefficients, merge_moments
from .launch import Launch, Settings, cdiv, power_of_2, warps_for

ONE_PROGRAM = 2048  # values (K, U) that the threads of one program hold in registers, in float64
AT_ONCE = 512  # values (split, K, U) that it reads before it merges them
READ_BY_ONE = 16384  # such values that one program reads rather than that another launch adds the units


@triton.jit
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
    FORM: tl.constexpr,  # -1: moments only
    BETA: tl.constexpr,
    REDUCE: tl.constexpr,
    ACC: tl.constexpr,
    SB: tl.constexpr,
    KB: tl.constexpr,
    UB: tl.constexpr,
):
    """Program: UB units, all sub-batches, SB splits at a time. REDUCE: it is the only one, and sums over units too."""
    units = tl.program_id(0).to(tl.int64) * UB + tl.arange(0, UB)
    k = tl.arange(0, KB)[:, None]
    mask = (k < K) & (units[None, :] < U)
    at = partial_ptr + k.to(tl.int64) * U + units[None, :]
    count = tl.zeros([KB, UB], tl.float64)
    mean = tl.zeros([KB, UB], tl.float64)
    m2 = tl.zeros([KB, UB], tl.float64)
    pilot = tl.load(at + 3 * plane, mask=mask, other=0.0).to(tl.float64)
    s = tl.arange(0, SB)[:, None, None]
    for start in range(0, splits, SB):
        here = at[None, :, :] + (start + s).to(tl.int64) * (K * U)
        real = mask[None, :, :] & (start + s < splits)
        counts = tl.load(here, mask=real, other=0.0).to(tl.float64)
        means = tl.load(here + plane, mask=real, other=0.0).to(tl.float64)
        spreads = tl.load(here + 2 * plane, mask=real, other=0.0).to(tl.float64)
        total = tl.sum(counts, 0)
        centre = tl.sum(counts * means, 0) / tl.maximum(total, 1)
        d = means - centre[None, :, :]
        count, mean, m2 = merge_moments(count, mean, m2, total, centre, tl.sum(spreads + counts * (d * d), 0))
    out = k.to(tl.int64) * U + units[None, :]
    if mean_ptr is not None:
        tl.store(mean_ptr + out, (pilot + mean).to(ACC), mask=mask)
    if FORM == -1:
        tl.store(var_ptr + out, (m2 / (M - 1)).to(ACC), mask=mask)
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
    return x.K, x.M, x.U, splits * x.K * x.U, splits


def rule(x: Geometry, splits: int, reduce: bool) -> Settings:
    """Choose settings: one program where its sum over units is wanted and there is little to read."""
    KB, UB = power_of_2(x.K), power_of_2(x.U)
    in_one = reduce and KB * UB <= ONE_PROGRAM and KB * UB * splits <= READ_BY_ONE
    if not in_one:
        UB = min(UB, max(1, min(16, 128 // KB)))  # few: float64 takes many registers
    SB = min(power_of_2(splits), AT_ONCE // (KB * UB))
    SB = SB if SB >= 4 else 1
    return Settings({"SB": SB, "KB": KB, "UB": UB}, warps_for((12 if in_one else 8 if SB > 1 else 16) * SB * KB * UB))


def plan(x: Geometry, splits: int, reduce: bool, settings: Settings | None = None) -> Launch:
    """Decide the launch. ``reduce``: wanted is the sum over units; REDUCE says whether the launch gives it."""
    tile, warps, _ = settings or rule(x, splits, reduce)
    programs = cdiv(x.U, tile["UB"])
    return Launch(finalise, (programs,), {**tile, "REDUCE": reduce and programs == 1}, warps)

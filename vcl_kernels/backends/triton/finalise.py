"""From moments to variance, loss and coefficients: one small kernel, which merges those of parts in a fixed order."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry
from .forms import Beta, coefficients
from .launch import RUN_TIME, Launch, Settings, cdiv, power_of_2, warps_for
from .moments import plane

ONE_PROGRAM = 2048  # values (part, K, units) of a tile of 16 warps, in float64: more would take too many registers
SEVERAL = 128  # of a tile of one of several programs
READ_BY_ONE = 16384  # values (part, K, U): up to so many, one program also sums over units, which saves a launch


class Tensors(NamedTuple):
    """What ``finalise`` reads and writes."""

    partial: Tensor  # from moments
    mean: Tensor | None  # written where sub-batches are in parts
    var: Tensor | None
    scale: Tensor | None
    loss: Tensor | None
    dbeta: Tensor | None
    beta: Tensor | None


@triton.jit(do_not_specialize=RUN_TIME)
def finalise(  # noqa: PLR0913
    tensors, beta_value: tl.float64, beta_min: tl.float64, factor: tl.float64, K, M, U, plane, parts,
    FORM: tl.constexpr,  # or None: moments alone
    BETA: tl.constexpr, REDUCE: tl.constexpr, ACC: tl.constexpr, SB: tl.constexpr, KB: tl.constexpr, UB: tl.constexpr,
):  # fmt: skip
    """Program: UB units at a time, all their sub-batches, SB parts at a time.

    With REDUCE it is the only program, and sums over units. Without parts, ``partial`` is m2 alone, and the means are
    already where they belong.
    """
    beta = Beta(tensors.beta, beta_value, beta_min, factor)
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
        m2 = tl.load(tensors.partial + plane + out, mask=mask, other=0.0)
        if parts > 1:
            # partial: all means, all m2, and each part's count. Means are summed as differences from the first part's
            one = tl.load(tensors.partial + out, mask=mask, other=0.0)
            mean = tl.zeros([KB, UB], tl.float64)
            for start in range(0, parts, SB):
                here, there, count = parts_at(tensors.partial, start + s, parts, plane, K.to(tl.int64) * U, out, mask)
                d = tl.load(here, mask=there, other=0.0) - one[None, :, :]
                mean += tl.sum(tl.where(there, count * d, 0.0), 0)
            mean = one + mean * (1.0 / tl.full([], M, tl.float64))
            m2 = tl.zeros([KB, UB], tl.float64)
            for start in range(0, parts, SB):
                here, there, count = parts_at(tensors.partial, start + s, parts, plane, K.to(tl.int64) * U, out, mask)
                d = tl.load(here, mask=there, other=0.0) - mean[None, :, :]
                m2 += tl.sum(count * (d * d) + tl.load(here + plane, mask=there, other=0.0), 0)
            if tensors.mean is not None:
                tl.store(tensors.mean + out, mean.to(ACC), mask=mask)
        if FORM is None:
            tl.store(tensors.var + out, (m2 * (1.0 / tl.full([], M - 1, tl.float64))).to(ACC), mask=mask)
        else:
            loss, scale, dbeta = coefficients(m2, K, M, units, U, beta, FORM, BETA, ACC)
            if tensors.scale is not None:
                tl.store(tensors.scale + out, scale, mask=mask)
            if REDUCE:
                total += tl.where(units < U, loss, 0.0)
            else:
                tl.store(tensors.loss + units, loss, mask=units < U)
            if tensors.dbeta is not None:
                if REDUCE and BETA == 1:
                    total_dbeta += tl.where(units < U, dbeta, 0.0)
                else:
                    tl.store(tensors.dbeta + units, dbeta, mask=units < U)
    if REDUCE:
        tl.store(tensors.loss, tl.sum(total, 0))
        if tensors.dbeta is not None and BETA == 1:
            tl.store(tensors.dbeta, tl.sum(total_dbeta, 0))


@triton.jit
def parts_at(partial, part, parts, plane, of_part, out, mask):
    """Where some parts have their means, which of those are there, and how many values each part has."""
    there = part < parts
    count = tl.load(partial + plane + plane + part, mask=there, other=0.0)
    return partial + out[None, :, :] + part.to(tl.int64) * of_part, mask[None, :, :] & there, count


@functools.lru_cache(maxsize=1024)
def rule(x: Geometry, one_program: bool) -> Settings:
    """Choose settings. Tiles depend on K alone: a network's layers share kernels."""
    KB = power_of_2(x.K)
    if one_program:
        return Settings({"SB": 1, "KB": KB, "UB": max(1, ONE_PROGRAM // KB)}, 16)
    UB = max(4, SEVERAL // KB)  # 4 units of float64 are the least that memory moves
    SB = max(1, min(4, ONE_PROGRAM // (KB * UB)))
    return Settings({"SB": SB, "KB": KB, "UB": UB}, warps_for(64 * KB * UB))


def plan(x: Geometry, parts: int, reduce: bool) -> Launch:
    """Decide the launch.

    ``reduce``: the sum over units is wanted. REDUCE: this launch computes it; else the caller does.
    """
    one_program = reduce and power_of_2(x.K) * x.U * parts <= READ_BY_ONE
    settings = rule(x, one_program)
    sizes = {"K": x.K, "M": x.M, "U": x.U, "plane": plane(x, parts), "parts": parts}
    grid = (1 if one_program else cdiv(x.U, settings.tile["UB"]),)
    return Launch(finalise, grid, sizes, {**settings.tile, "REDUCE": one_program}, settings)

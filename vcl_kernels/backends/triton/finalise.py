"""From moments to variance, or to loss, scale and dbeta: one small kernel. It merges parts in a fixed order."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import Geometry
from .forms import Beta, loss_and_scale
from .launch import RUN_TIME, Launch, cdiv, power_of_2, warps_for
from .moments import m2_offset

MOST_OF_TILE = 2048  # most values of a tile [part, K, units] of 16 warps: in float64 more take too many registers
SEVERAL = 128  # values of a tile [K, units] where there are several programs
READ_BY_ONE = 16384  # values [part, K, U]: up to this many, one program also sums over units, which saves a launch


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
    tensors, beta_value: tl.float64, beta_min: tl.float64, factor: tl.float64, K, M, U, m2_offset, parts,
    FORM: tl.constexpr, BETA: tl.constexpr, REDUCE: tl.constexpr, ACC: tl.constexpr,
    PARTB: tl.constexpr, KB: tl.constexpr, UB: tl.constexpr,
):  # fmt: skip
    """Program: UB units at a time, all their sub-batches, PARTB parts at a time. Without a FORM: moments alone.

    With REDUCE it is the only program, and sums over units. Without parts, ``partial`` is m2 alone, and the means are
    already where they belong.
    """
    beta = Beta(tensors.beta, beta_value, beta_min, factor)
    first = tl.program_id(0).to(tl.int64) * UB
    end = U if REDUCE else tl.minimum(first + UB, U)
    k = tl.arange(0, KB)[:, None]
    part = tl.arange(0, PARTB)[:, None, None]
    part_stride = K.to(tl.int64) * U
    total = tl.zeros([UB], tl.float64)
    total_dbeta = tl.zeros([UB], tl.float64)
    for first_unit in range(first, end, UB):
        units = first_unit + tl.arange(0, UB)
        mask = (k < K) & (units[None, :] < U)
        out = k.to(tl.int64) * U + units[None, :]
        m2 = tl.load(tensors.partial + m2_offset + out, mask=mask, other=0.0)
        if parts > 1:
            # partial: all means, all m2, and each part's count. Means are summed as differences from the first part's
            mean_of_first = tl.load(tensors.partial + out, mask=mask, other=0.0)
            mean = tl.zeros([KB, UB], tl.float64)
            for start in range(0, parts, PARTB):
                at, valid, count = parts_at(tensors.partial, start + part, parts, m2_offset, part_stride, out, mask)
                d = tl.load(at, mask=valid, other=0.0) - mean_of_first[None, :, :]
                mean += tl.sum(tl.where(valid, count * d, 0.0), 0)
            mean = mean_of_first + mean * (1.0 / tl.full([], M, tl.float64))
            m2 = tl.zeros([KB, UB], tl.float64)
            for start in range(0, parts, PARTB):
                at, valid, count = parts_at(tensors.partial, start + part, parts, m2_offset, part_stride, out, mask)
                d = tl.load(at, mask=valid, other=0.0) - mean[None, :, :]
                m2 += tl.sum(count * (d * d) + tl.load(at + m2_offset, mask=valid, other=0.0), 0)
            if tensors.mean is not None:
                tl.store(tensors.mean + out, mean.to(ACC), mask=mask)
        if FORM is None:
            tl.store(tensors.var + out, (m2 * (1.0 / tl.full([], M - 1, tl.float64))).to(ACC), mask=mask)
        else:
            loss, scale, dbeta = loss_and_scale(m2, K, M, units, U, beta, FORM, BETA, ACC)
            if tensors.scale is not None:
                tl.store(tensors.scale + out, scale, mask=mask)
            if REDUCE:
                total += tl.where(units < U, loss, 0.0)
            else:
                tl.store(tensors.loss + units, loss, mask=units < U)
            if tensors.dbeta is not None:
                if REDUCE and BETA == "one":
                    total_dbeta += tl.where(units < U, dbeta, 0.0)
                else:
                    tl.store(tensors.dbeta + units, dbeta, mask=units < U)
    if REDUCE:
        tl.store(tensors.loss, tl.sum(total, 0))
        if tensors.dbeta is not None and BETA == "one":
            tl.store(tensors.dbeta, tl.sum(total_dbeta, 0))


@triton.jit
def parts_at(partial, part, parts, m2_offset, part_stride, out, mask):
    """Where the means of some parts lie, which of them exist, and how many values each part has."""
    exists = part < parts
    count = tl.load(partial + m2_offset + m2_offset + part, mask=exists, other=0.0)
    return partial + out[None, :, :] + part.to(tl.int64) * part_stride, mask[None, :, :] & exists, count


@functools.lru_cache(maxsize=1024)
def plan(x: Geometry, parts: int, reduce: bool) -> Launch:
    """Decide the launch. Tile and warps depend on K alone, so that a network's layers share kernels.

    ``reduce``: the sum over units is wanted. REDUCE: this launch computes it; else the caller does.
    """
    KB = power_of_2(x.K)
    one_program = reduce and KB * x.U * parts <= READ_BY_ONE
    UB = max(1, MOST_OF_TILE // KB) if one_program else max(4, SEVERAL // KB)  # memory moves 4 float64 at least
    PARTB = 1 if one_program else max(1, min(4, MOST_OF_TILE // (KB * UB)))
    tile, warps = {"PARTB": PARTB, "KB": KB, "UB": UB}, 16 if one_program else warps_for(64 * KB * UB)
    sizes = {"K": x.K, "M": x.M, "U": x.U, "m2_offset": m2_offset(x, parts), "parts": parts}
    grid = (1 if one_program else cdiv(x.U, UB),)
    return Launch(finalise, grid, sizes, {**tile, "REDUCE": one_program}, tile, warps)

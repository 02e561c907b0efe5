"""From the variances of a unit to its loss, scale and dbeta. In float64, since these are few values."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Beta(NamedTuple):
    """Beta as kernels get it, and the factor of the loss and its gradients. max(beta, minimum) acts."""

    tensor: Tensor | None  # of one value or of one for each unit
    value: float  # used without a tensor
    minimum: float
    factor: float


@triton.jit
def beta_of(beta, units, U, BETA: tl.constexpr):
    """Beta of some units in float64: a "number", "one" tensor element for all units, or one of "each" unit."""
    if BETA == "number":
        return tl.full(units.shape, beta.value, tl.float64)
    elif BETA == "one":
        return tl.load(beta.tensor).to(tl.float64) + tl.zeros(units.shape, tl.float64)
    elif BETA == "each":
        return tl.load(beta.tensor + units, mask=units < U, other=1.0).to(tl.float64)
    else:
        tl.static_assert(False, "unknown BETA")


@triton.jit
def loss_of_variances(var, K, beta, FORM: tl.constexpr):
    """Loss of each unit, and its derivatives by var [KB, UB] and by beta: the table of the README.

    A division in float64 is a call, which takes registers: there is one for each pair, unit and count.
    """
    KB: tl.constexpr = var.shape[0]
    UB: tl.constexpr = var.shape[1]
    if FORM == "ratio":  # the mean over pairs (a, b) of (1 - r)², r = v_a / (v_b + beta)
        pairs = tl.reshape(var, [KB // 2, 2, UB])
        is_b = tl.arange(0, 2)[None, :, None] == 1
        va = tl.sum(tl.where(is_b, 0.0, pairs), 1)
        vb = tl.sum(tl.where(is_b, pairs, 0.0), 1)
        valid = tl.arange(0, KB // 2)[:, None] * 2 < K
        guarded = vb + beta[None, :]
        inverse = 1.0 / guarded
        ratio = va * inverse
        one_minus_ratio = (guarded - va) * inverse
        per_pair = 1.0 / tl.full([], K // 2, tl.float64)
        loss = tl.sum(tl.where(valid, one_minus_ratio * one_minus_ratio, 0.0), 0) * per_pair
        minus_dva = tl.where(valid, 2.0 * one_minus_ratio * inverse * per_pair, 0.0)
        dvb = tl.where(valid, minus_dva * ratio, 0.0)
        dvar = tl.reshape(tl.where(is_b, dvb[:, None, :], -minus_dva[:, None, :]), [KB, UB])
        return loss, dvar, tl.sum(dvb, 0)
    else:  # V = Σ (v_k - v̄)² / (K - 1)
        valid = tl.arange(0, KB)[:, None] < K
        per_k = 1.0 / tl.full([], K, tl.float64)
        unbiased = 1.0 / tl.full([], K - 1, tl.float64)
        vbar = tl.sum(tl.where(valid, var, 0.0), 0) * per_k
        d = tl.where(valid, var - vbar[None, :], 0.0)
        d -= (tl.sum(d, 0) * per_k)[None, :]  # the rounding of the mean, where variances are nearly equal
        d = tl.where(valid, d, 0.0)
        V = tl.sum(d * d, 0) * unbiased
        dV = 2.0 * unbiased * d
        if FORM == "variance":
            return V, dV, tl.zeros_like(vbar)
        elif FORM == "relative_variance":  # V / (v̄ + beta)²
            inverse = 1.0 / (vbar + beta)
            loss = V * inverse * inverse
            dvbar = -2.0 * loss * inverse
            return loss, dV * (inverse * inverse)[None, :] + (dvbar * per_k)[None, :], dvbar
        else:
            tl.static_assert(False, "unknown FORM")


@triton.jit
def loss_and_scale(m2, K, M, units, U, beta, FORM: tl.constexpr, BETA: tl.constexpr, ACC: tl.constexpr):
    """Loss, scale [KB, UB] and dbeta, all times the factor, from m2 [KB, UB]. Only scale is rounded to ACC here."""
    free_beta = beta_of(beta, units, U, BETA)
    minimum = tl.full(units.shape, beta.minimum, tl.float64)
    bounded_beta = tl.where(free_beta < minimum, minimum, free_beta)
    unbiased = 1.0 / tl.full([], M - 1, tl.float64)
    var = m2.to(tl.float64) * unbiased
    loss, dvar, dbeta = loss_of_variances(var, K, bounded_beta, FORM)
    factor = tl.full(units.shape, beta.factor, tl.float64)
    dbeta *= factor
    if BETA == "each":
        dbeta = projected_gradient(dbeta, free_beta < minimum)
    return loss * factor, (dvar * (factor * 2.0 * unbiased)[None, :]).to(ACC), dbeta


@triton.jit
def projected_gradient(dbeta, below):
    """dbeta without what would push a beta below its bound further down."""
    return tl.where(below & (dbeta >= 0), 0.0, dbeta)

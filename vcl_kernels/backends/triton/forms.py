"""From the variances of a unit to its loss and to the coefficients of dx, in float64: values are few."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Beta(NamedTuple):
    """Beta as kernels get it; max(beta, least) acts. ``factor`` multiplies the loss and its gradients."""

    tensor: Tensor | None  # of one value or of one for each unit
    value: float  # where there is no tensor
    least: float
    factor: float


@triton.jit
def beta_of(beta, units, U, BETA: tl.constexpr):
    """Beta of some units in float64: 0, the value; 1, one tensor element for all; 2, one for each unit."""
    if BETA == 0:
        return tl.full(units.shape, beta.value, tl.float64)
    elif BETA == 1:
        return tl.load(beta.tensor).to(tl.float64) + tl.zeros(units.shape, tl.float64)
    else:
        return tl.load(beta.tensor + units, mask=units < U, other=1.0).to(tl.float64)


@triton.jit
def loss_of_variances(var, K, beta, FORM: tl.constexpr):
    """Loss of each unit, its derivatives by var [KB, UB] and by beta: the table of the README.

    Divisions in float64 are calls, which take registers: one for each pair or unit, and for each count.
    """
    KB: tl.constexpr = var.shape[0]
    UB: tl.constexpr = var.shape[1]
    if FORM == "ratio":  # the mean over pairs (a, b) of (1 - r)², r = v_a / (v_b + beta)
        pairs = tl.reshape(var, [KB // 2, 2, UB])
        is_b = tl.arange(0, 2)[None, :, None] == 1
        va = tl.sum(tl.where(is_b, 0.0, pairs), 1)
        vb = tl.sum(tl.where(is_b, pairs, 0.0), 1)
        real = tl.arange(0, KB // 2)[:, None] * 2 < K
        guarded = vb + beta[None, :]
        inverse = 1.0 / guarded
        ratio = va * inverse
        rest = (guarded - va) * inverse
        share = 1.0 / tl.full([], K // 2, tl.float64)
        loss = tl.sum(tl.where(real, rest * rest, 0.0), 0) * share
        slope = tl.where(real, 2.0 * rest * inverse * share, 0.0)
        slope_b = tl.where(real, slope * ratio, 0.0)
        dvar = tl.reshape(tl.where(is_b, slope_b[:, None, :], -slope[:, None, :]), [KB, UB])
        return loss, dvar, tl.sum(slope_b, 0)
    else:  # V = Σ (v_k - v̄)² / (K - 1), and relative_variance: V / (v̄ + beta)²
        k = tl.arange(0, KB)[:, None]
        share = 1.0 / tl.full([], K, tl.float64)
        unbiased = 1.0 / tl.full([], K - 1, tl.float64)
        vbar = tl.sum(tl.where(k < K, var, 0.0), 0) * share
        d = tl.where(k < K, var - vbar[None, :], 0.0)
        d -= (tl.sum(d, 0) * share)[None, :]  # the rounding of the mean, where variances are nearly equal
        d = tl.where(k < K, d, 0.0)
        variation = tl.sum(d * d, 0) * unbiased
        dvar = 2.0 * unbiased * d
        if FORM == "variance":
            return variation, dvar, tl.zeros_like(vbar)
        else:
            inverse = 1.0 / (vbar + beta)
            loss = variation * inverse * inverse
            by_vbar = -2.0 * loss * inverse
            return loss, dvar * (inverse * inverse)[None, :] + (by_vbar * share)[None, :], by_vbar


@triton.jit
def coefficients(m2, K, M, units, U, beta, FORM: tl.constexpr, BETA: tl.constexpr, ACC: tl.constexpr):
    """Loss, scale [KB, UB] and dbeta, all times the factor, from m2 [KB, UB].

    Only scale, which meets every x, is rounded to ACC here.
    """
    given = beta_of(beta, units, U, BETA)
    least = tl.full(units.shape, beta.least, tl.float64)
    unbiased = 1.0 / tl.full([], M - 1, tl.float64)
    var = m2.to(tl.float64) * unbiased
    bounded_beta = tl.where(given < least, least, given)
    loss, dvar, dbeta = loss_of_variances(var, K, bounded_beta, FORM)
    weight = tl.full(units.shape, beta.factor, tl.float64)
    dbeta *= weight
    if BETA == 2:
        dbeta = projected_gradient(dbeta, given, least)
    return loss * weight, (dvar * (weight * 2.0 * unbiased)[None, :]).to(ACC), dbeta


@triton.jit
def projected_gradient(dbeta, beta, least):
    """The gradient of a beta that acts as max(beta, least): below that, nothing that would lower it."""
    return tl.where((beta < least) & (dbeta >= 0), 0.0, dbeta)

"""The steps that kernels share: the loss of a unit, its slopes, and what they make of a sample's moments."""

import triton
import triton.language as tl


@triton.jit
def given_beta(beta_ptr, beta_value, u, valid, BETA: tl.constexpr):
    """Beta of units u in float64: 0, the value; 1, one tensor element for all; 2, one for each unit."""
    if BETA == 0:
        return tl.full(u.shape, beta_value, tl.float64)
    elif BETA == 1:
        return tl.load(beta_ptr).to(tl.float64) + tl.zeros(u.shape, tl.float64)
    else:
        return tl.load(beta_ptr + u, mask=valid, other=1.0).to(tl.float64)


@triton.jit
def loss_and_slopes(var, k, K, beta, FORM: tl.constexpr, KB: tl.constexpr, UB: tl.constexpr):
    """Loss of each unit, its derivatives by var [KB, UB] and by beta: the table of the README.

    Divisions in float64 are calls, which take registers: one for each pair or unit, and for each count.
    """
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
def may_only_rise(dbeta, beta, beta_min):
    """The gradient of a beta that acts as max(beta, beta_min): below that, nothing that would lower it."""
    return tl.where((beta >= beta_min) | (dbeta < 0), dbeta, 0.0)


@triton.jit
def coefficients(
    m2,
    k,
    K,
    M,
    u,
    valid,
    beta_ptr,
    beta_value,
    beta_min,
    factor,
    FORM: tl.constexpr,
    BETA: tl.constexpr,
    ACC: tl.constexpr,
    KB: tl.constexpr,
    UB: tl.constexpr,
):
    """Loss, scale [KB, UB] of dx = scale · (x - mean), and dbeta, all times factor.

    From m2 = Σ (x - mean)², in float64: they are few, and differences of variances lose digits. Only scale, which
    meets every x, is rounded to ACC here.
    """
    given = given_beta(beta_ptr, beta_value, u, valid, BETA)
    least = tl.full([UB], beta_min, tl.float64)
    unbiased = 1.0 / tl.full([], M - 1, tl.float64)
    var = m2.to(tl.float64) * unbiased
    loss, dvar, dbeta = loss_and_slopes(var, k, K, tl.where(given < least, least, given), FORM, KB, UB)
    weight = tl.full([UB], factor, tl.float64)
    dbeta *= weight
    if BETA == 2:  # one beta: once it is summed
        dbeta = may_only_rise(dbeta, given, least)
    scale = dvar * (weight * 2.0 * unbiased)[None, :]
    return loss * weight, scale.to(ACC), dbeta

"""Two Gaussians through a linear unit that learns by VCL alone: does it join them or separate them?

The unit sees the mixture at a distance D·|cos θ| of its means, θ the angle of its weights to the line between them.
Its kurtosis, and with it the variance of sample variances, falls with that distance exactly when p (1 - p) > 1/6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import vcl_kernels as vk

from .work import Record

PRIORS = (0.05, 0.1, 0.15, 0.17, 0.18, 0.19, 0.2, 0.205, 0.21, 0.215, 0.22, 0.225, 0.23, 0.24, 0.25, 0.3, 0.4, 0.5)
THRESHOLD = (1 - math.sqrt(1 / 3)) / 2  # the prior at which p (1 - p) = 1/6
DISTANCE = 4.0  # of the means, in standard deviations
SAMPLES, SUB_BATCH = 2000, 50
SEPARATED = 0.5  # |cos θ| from which a unit counts as separating: it starts there or near


def learn(prior: float, form: str, seeds: int, steps: int) -> Record:
    """Return |cos θ| and the kurtosis of ``seeds`` units after learning, each with its own data and first weights."""
    random = torch.Generator().manual_seed(round(1000 * prior))
    angle = math.pi / 3 + (torch.rand(seeds, generator=random) - 0.5) * math.pi / 6  # |cos θ| about 1/2
    weights = torch.stack([angle.cos(), angle.sin()]).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        z = through(weights, prior, random)
        vk.vcl_loss(z, **loss_settings(form), reduction="sum").backward()
        optimizer.step()
    with torch.no_grad():
        cosine = weights[0].abs() / weights.norm(dim=0)
        z = through(weights, prior, random)
        centred = z - z.mean(0)
        kurtosis = centred.pow(4).mean(0) / centred.square().mean(0).square()
    return {"cosine": rounded(cosine), "kurtosis": rounded(kurtosis)}


def through(weights: Tensor, prior: float, random: torch.Generator) -> Tensor:
    """Return the pre-activations of new samples, (samples, units)."""
    x = torch.randn(2, SAMPLES, weights.shape[1], generator=random)
    x[0] += DISTANCE * (torch.rand(x[0].shape, generator=random) < prior)
    return (weights[:, None] * x).sum(0)


def loss_settings(form: str) -> dict[str, Any]:
    """All sub-batches, and no beta: the loss of the theory, which does not see scale."""
    return {"form": form, "beta": 0.0, "sub_batch_size": SUB_BATCH, "num_sub_batches": SAMPLES // SUB_BATCH}


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def threshold(priors: list[float], cosines: list[list[float]]) -> tuple[float, float]:
    """Return the prior at which units turn to separating (NaN: nowhere), and half of its 95 % interval (bootstrap).

    It is where the share of units that separate, made monotonic in the prior, passes 1/2.
    """
    import numpy as np
    from scipy.optimize import brentq, isotonic_regression
    from scipy.stats import bootstrap

    fate = (np.array(cosines) > SEPARATED).astype(float)  # (priors, units)

    def turning(units: np.ndarray) -> float:
        share = isotonic_regression(fate[:, units.astype(int)].mean(1)).x
        if not share[0] < 0.5 < share[-1]:
            return float("nan")
        return float(brentq(lambda prior: np.interp(prior, priors, share) - 0.5, priors[0], priors[-1]))

    units = np.arange(fate.shape[1])
    place = turning(units)
    if math.isnan(place):
        return place, place
    interval = bootstrap((units,), turning, vectorized=False, method="percentile", n_resamples=500, rng=0)
    low, high = interval.confidence_interval
    return place, (high - low) / 2

"""The beta at which the ratio asks for the variance that a layer has."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import channels_first
from ..functional import sub_batch_moments
from ..options import BackendName, Unit, number_of_sub_batches
from ..scale import variance_over_beta

__all__ = ["Fit", "fitting_beta"]


@torch.no_grad()
def fitting_beta(
    x: Tensor, n: int, unit: Unit, num_sub_batches: int | None = None, backend: BackendName | None = None
) -> Tensor:
    """Return ``v̄ / variance_over_beta(M)``, a scalar on x's device: where v̄ is the variance, the ratio is least.

    Args:
        x: ``(N, C, *spatial)``, N at least 2n.
        n: samples in a sub-batch; M = n for activation units and n·P for channel units.
        unit, num_sub_batches, backend: of the loss, as for :func:`vcl_kernels.vcl_loss`. v̄ is the mean variance over
            units and the sub-batches that take part in the loss.
    """
    K = min(number_of_sub_batches("ratio", x.shape[0], n, num_sub_batches), x.shape[0] // n)
    _, var = sub_batch_moments(x.detach(), n, unit=unit, num_sub_batches=K, backend=backend)
    return var.mean() / variance_over_beta(n if unit == "activation" else n * math.prod(x.shape[2:]))


class Fit(NamedTuple):
    """What beta is in a layer of which the example is typical."""

    model: nn.Module
    n: int
    unit: Unit
    num_sub_batches: int | None
    channel_dim: int | None

    def __call__(self, module: nn.Module, x: Tensor, channel_dim: int) -> float:
        """Return the beta at which the ratio asks for the variance of ``x``, the example's tensor there."""
        rows = x.shape[0]
        if rows < 2 * self.n or x.is_meta:
            name = next((name for name, known in self.model.named_modules() if known is module), "")
            got = "one on meta" if x.is_meta else f"{rows} there"
            raise ValueError(
                'beta_init="example" wants a batch of training data as example_input, with at least '
                f"2 * sub_batch_size = {2 * self.n} rows in layer {name!r}; got {got}"
            )
        view = channels_first(x, self.channel_dim or channel_dim)
        return float(fitting_beta(view, self.n, self.unit, self.num_sub_batches))

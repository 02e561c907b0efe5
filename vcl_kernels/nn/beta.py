"""The beta at which the ratio asks for the variance that a layer has."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..checks import channels_first
from ..functional import sub_batch_moments
from ..options import BackendName, BetaMode, Form, Unit, number_of_sub_batches
from ..scale import variance_over_beta

__all__ = ["Fit", "check_same_in_training", "fitting_beta", "said", "why_not_loaded"]


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
        rows, name = x.shape[0], next((n for n, known in self.model.named_modules() if known is module), "")
        if rows < 2 * self.n or x.is_meta:
            got = "one on meta" if x.is_meta else f"{rows} there"
            raise ValueError(
                'beta_init="example" wants a batch of training data as example_input, with at least '
                f"2 * sub_batch_size = {2 * self.n} rows in layer {name!r}; got {got}. To leave the layer out, list "
                "the others in layers="
            )
        view = channels_first(x, self.channel_dim or channel_dim)
        beta = float(fitting_beta(view, self.n, self.unit, self.num_sub_batches))
        if not 0 < beta < math.inf:
            raise ValueError(
                f'beta_init="example" wants an example that varies in layer {name!r}; the beta that fits is {beta}. '
                "Give beta_init a number, or leave the layer out: list the others in layers="
            )
        return beta


def check_same_in_training(model: nn.Module) -> None:
    """Raise ValueError if ``model`` has batch norm: in evaluation its outputs are not those of training."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.track_running_stats:
            raise ValueError(
                f'beta_init="example" runs the example in evaluation, where batch norm {name!r} has other outputs than '
                "in training; give beta_init a number, or call vcl_kernels.remove_batch_norm first"
            )


def why_not_loaded(loaded: Tensor, name: str, beta: Tensor | None, mode: BetaMode, *, strict: bool) -> list[str]:
    """Return what is wrong with a beta of a checkpoint, apart from its shape, for a VCL that has ``beta``."""
    if beta is None and strict:
        return [
            f'{name} was saved with beta_mode "learned" or "running", or beta_init="example"; this one is not saved'
        ]
    if beta is not None and mode != "running" and not loaded.is_meta and not loaded.isfinite().all():
        return [f"{name} is not finite: perhaps a running beta that no batch had set"]
    return []


def said(beta: Tensor | None, mode: BetaMode, init: float, form: Form) -> str:
    """Return a beta that is not learned as text."""
    if form == "variance" or mode == "running":
        return "none" if form == "variance" else "running"
    return f"{init if beta is None or beta.is_meta else float(beta):.4g}"

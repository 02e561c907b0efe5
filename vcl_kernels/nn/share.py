"""Which share of the gradient at a layer's input is VCL's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import channels_first
from ..functional import vcl_loss
from ..geometry import accumulation_dtype
from ..injection import Injection
from ..options import number_of_sub_batches
from .modules import VCLActivation

__all__ = ["Share"]


class Share:
    """The share of one call: ``‖g_vcl‖ / (‖g_vcl‖ + ‖g - g_vcl‖)``, g the gradient that arrives at its input x.

    ``g_vcl = u · weight · d vcl_loss / dx``, u the upstream gradient of the layer's loss. The derivative is taken in
    forward, where beta and x are what the loss saw: later an optimizer or an in-place operation may have changed them.

    Args:
        x: the input, which needs a gradient.
        vcl: the layer's.
        beta: that acts; None if the form has none.
        keep: gets the share, a scalar on x's device; NaN after a second backward through the same forward.
    """

    def __init__(self, x: Tensor, vcl: VCLActivation, beta: Tensor | None, keep: Callable[[Tensor], None]) -> None:
        self.keep = keep
        self.own = _derivative(x, vcl, beta)
        self.injection: Injection | None = vcl.steering.injection() if vcl.steering.inject else None
        self.upstream: Tensor | None = None  # of the loss; it arrives before the gradient of x is complete
        self.arrived = False

    def note_upstream(self, u: Tensor) -> None:
        """Note the upstream gradient of the loss."""
        self.upstream = u.detach()

    @torch.no_grad()
    def arrive(self, g: Tensor) -> None:
        """Note the gradient of x."""
        g = g.detach().to(accumulation_dtype(g.dtype))
        if self.arrived:
            self.keep(torch.full((), torch.nan, dtype=g.dtype, device=g.device))
            return
        self.arrived = True
        u = self.upstream if self.injection is None else self.injection.upstream(g)
        if self.own is None or u is None:
            vcl, rest = g.new_zeros(()), torch.linalg.vector_norm(g)
        else:
            own = u.to(g) * self.own.to(g.dtype)
            rows = len(own)
            vcl = torch.linalg.vector_norm(own)
            rest = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(g[:rows] - own), torch.linalg.vector_norm(g[rows:])])
            )
        self.own = None
        self.keep(vcl / (vcl + rest))


def _derivative(x: Tensor, vcl: VCLActivation, beta: Tensor | None) -> Tensor | None:
    """Return d loss / dx of the rows that take part, for an upstream gradient of 1; None where the loss is 0."""
    rows, n = x.shape[0], vcl.sub_batch_size
    if rows < 2 * n:
        return None
    K = None if vcl.num_sub_batches is None else min(vcl.num_sub_batches, rows // n)
    rows = n * number_of_sub_batches(vcl.form, rows, n, K)
    settings: dict[str, Any] = {"sub_batch_size": n, "form": vcl.form, "unit": vcl.unit, "num_sub_batches": K}
    # Hooks that do nothing, in place of those of a checkpoint: it counts what its forward saves
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        leaf = x.detach()[:rows].to(accumulation_dtype(x.dtype)).requires_grad_()
        loss = vcl_loss(channels_first(leaf, vcl.channel_dim), beta, backend=vcl.backend, **settings)
        (derivative,) = torch.autograd.grad(loss, leaf)
    return vcl.weight * vcl.steering.weight * derivative


def _same(t: Tensor) -> Tensor:
    return t

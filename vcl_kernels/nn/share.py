"""Which share of the gradient at a layer's input is VCL's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..checks import channels_first
from ..functional import vcl_loss
from ..geometry import accumulation_dtype
from ..injection import Injection
from ..options import number_of_sub_batches
from ..torch_private import is_batched
from .modules import VCLActivation
from .report import unseen_by_checkpoints
from .rows import Row

__all__ = ["Share"]

BATCHED = "its gradient is that of several backward passes in one (is_grads_batched)"


class Share:
    """The share of one call: ``‖g_vcl‖ / (‖g_vcl‖ + ‖g - g_vcl‖)``, g the gradient that arrives at its input x.

    ``g_vcl = u · weight · d vcl_loss / dx``, u the upstream gradient of the layer's loss. The derivative is taken in
    forward, where beta and x are what the loss saw: later an optimizer or an in-place operation may have changed them.

    Args:
        x: the input, which needs a gradient.
        vcl: the layer's.
        beta: that acts; None if the form has none.
        row: gets the share, a scalar on x's device; NaN after a second backward through the same forward.
    """

    def __init__(self, x: Tensor, vcl: VCLActivation, beta: Tensor | None, row: Row) -> None:
        self.row = row
        self.own = _derivative(x, vcl, beta)
        self.injection: Injection | None = vcl.steering.injection() if vcl.steering.inject else None
        self.upstream: Tensor | None = None  # of the loss; it arrives before the gradient of x is complete
        self.arrived = False
        self.on_leaf: RemovableHandle | None = None  # x outlives its graph, and gets gradients of later forwards

    def note_upstream(self, u: Tensor) -> str | None:
        """Note the upstream gradient of the loss."""
        if is_batched(u):
            return BATCHED
        self.upstream = u.detach()
        return None

    @torch.no_grad()
    def arrive(self, g: Tensor) -> str | None:
        """Note the gradient of x."""
        if self.on_leaf is not None:
            self.on_leaf.remove()
        if is_batched(g):
            return BATCHED
        g = g.detach().to(accumulation_dtype(g.dtype))
        if self.arrived:
            self.row.values["share"] = torch.full((), torch.nan, dtype=g.dtype, device=g.device)
            return None
        self.arrived = True
        u = self.upstream if self.injection is None else self.injection.upstream(g)
        own, self.own = self.own, None
        self.row.values["share"] = _share(g, None if u is None else own, u)
        return None


def _share(g: Tensor, own: Tensor | None, u: Tensor | None) -> Tensor:
    """Return the share in g of u times ``own``, which is of the first rows. Squares must not leave the range."""
    largest = _largest(g)
    g = g / largest
    if own is None or u is None:
        norm, rest = g.new_zeros(()), torch.linalg.vector_norm(g)
    else:
        own = own.to(g.dtype)
        factor = _largest(own)
        own = own / factor * (u.to(g) / largest * factor)
        rows = len(own)
        norm = torch.linalg.vector_norm(own)
        rest = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g[:rows] - own), torch.linalg.vector_norm(g[rows:])])
        )
    return norm / (norm + rest)


def _largest(t: Tensor) -> Tensor:
    """Return the largest absolute value, or 1 if all are 0."""
    largest = t.abs().amax()
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def _derivative(x: Tensor, vcl: VCLActivation, beta: Tensor | None) -> Tensor | None:
    """Return d loss / dx of the rows that take part, for an upstream gradient of 1; None where the loss is 0."""
    rows, n = x.shape[0], vcl.sub_batch_size
    if rows < 2 * n:
        return None
    wanted = None if vcl.num_sub_batches is None else min(vcl.num_sub_batches, rows // n)
    K = number_of_sub_batches(vcl.form, rows, n, wanted)
    settings: dict[str, Any] = {"sub_batch_size": n, "form": vcl.form, "unit": vcl.unit, "num_sub_batches": K}
    with torch.enable_grad(), unseen_by_checkpoints():
        leaf = x.detach()[: n * K].to(accumulation_dtype(x.dtype)).requires_grad_()
        loss = vcl_loss(channels_first(leaf, vcl.channel_dim), beta, backend=vcl.backend, **settings)
        (derivative,) = torch.autograd.grad(loss, leaf)
    return vcl.weight * vcl.steering.weight * derivative

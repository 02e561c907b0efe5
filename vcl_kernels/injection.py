"""Losses that nobody adds: they enter the graph through a layer's output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import accumulation_dtype
from .torch_private import in_functorch


class Injection(NamedTuple):
    """How an injected loss is done: its backward starts with that of the layer's output."""

    scaler: torch.amp.GradScaler | None = None  # the objective's, if it has one
    accumulation: int = 1  # backward passes whose gradients are added before a step
    weight: float = 1.0  # that of the loss changed by so much since it became a constant of a compiler's graph
    given: Tensor | None = None  # the upstream gradient, if it is an input of the graph

    @property
    def factor(self) -> float:
        """The loss's upstream gradient, without a scaler."""
        return self.weight / self.accumulation

    def upstream(self, x: Tensor) -> Tensor:
        """Return the loss's upstream gradient: :attr:`factor` times the scaler's scale."""
        if self.given is not None:
            return self.given
        g = torch.full((), self.factor, dtype=accumulation_dtype(x.dtype), device=x.device)
        return g if self.scaler is None else self.scaler.scale(g)


def injected(y: Tensor, loss: Tensor, injection: Injection) -> tuple[Tensor, Tensor]:
    """Put ``loss`` into the graph of ``y``; return y and the loss detached."""
    if in_functorch():  # inside vmap a loss does not know whether it requires a gradient
        return InjectLossInFunctorch.apply(y, loss, injection), loss.detach()
    value = loss.detach()
    if torch.compiler.is_compiling():  # as a factor of a tensor, a number may change without a recompilation
        loss, injection = loss * injection.factor, Injection(injection.scaler)
    return (InjectLoss.apply(y, loss, injection) if loss.requires_grad else y), value


class InjectLoss(torch.autograd.Function):
    """The identity on y, whose backward starts that of ``loss``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, _loss: Tensor, injection: Injection) -> Tensor:
        ctx.injection = injection
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy, ctx.injection.upstream(dy), None


class InjectLossInFunctorch(InjectLoss):
    """The same in the form that ``torch.func`` wants, which takes longer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, _loss: Tensor, _injection: Injection) -> Tensor:  # type: ignore[override]
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Injection], _output: Tensor) -> None:
        ctx.injection = inputs[2]

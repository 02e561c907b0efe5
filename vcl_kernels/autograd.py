"""The autograd functions around the ops: what backward computes from what forward saved.

The first derivative is the kernels'. A backward that is itself differentiated (``create_graph=True``) goes through the
reference, so that second derivatives are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, saving
from .backends.interface import Backend, Coefficients, Saved
from .geometry import empty_rows
from .injection import Injection
from .options import Activation, LossSpec, SubBatches
from .torch_private import is_traced, keeps_graph

Gradients = tuple[Tensor | None, ...]  # one for each argument of forward


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Backend) -> Tensor:
    """Differentiable loss of ``x``, which lies in a supported layout."""
    if not wants_gradient(x, beta):
        return backend.loss(x, beta, spec)
    saves = saving.for_loss(x, spec, backend)
    if saves == "dx":
        return OnePassLoss.apply(x, beta, spec, backend)
    return DeferredLoss.apply(x, beta, spec, backend, saves == "rows")[0]


def wants_gradient(x: Tensor, beta: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and (x.requires_grad or (beta is not None and beta.requires_grad))


class OnePassLoss(torch.autograd.Function):
    """Loss and gradient in one pass over x. Backward has nothing to do if the upstream gradient is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Backend) -> Tensor:
        """Save dx for an upstream gradient of 1, and x for a second derivative."""
        beta_grad = ctx.needs_input_grad[1]
        loss, dx, dbeta = backend.loss_dx(x, beta, spec, beta_grad)
        ctx.save_for_backward(x, beta, dx, dbeta if beta_grad else None)
        ctx.spec, ctx.backend = spec, backend
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Gradients:
        """Multiply what forward computed by the upstream gradient."""
        x, beta, dx, dbeta = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(x, beta, ctx.spec, ctx.needs_input_grad, g), None, None
        if ctx.needs_input_grad[0]:
            dx = _multiplied(dx, g, ctx.backend)
        return dx, _beta_gradient(beta, dbeta, g), None, None


class DeferredLoss(torch.autograd.Function):
    """Loss in forward; in backward dx = g · scale · (x - mean), rounded once.

    With ``keep_rows`` the rows that take part are saved and returned as a second output, through which a second
    derivative reaches x. Otherwise x is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Backend, keep_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Save x or its rows that take part, and the coefficients."""
        ctx.set_materialize_grads(False)
        beta_grad = ctx.needs_input_grad[1]
        loss, (mean, scale, _), dbeta, rows = backend.loss_coefficients(x, beta, spec, beta_grad, keep_rows)
        ctx.save_for_backward(rows if keep_rows else x, beta, mean, scale, dbeta if beta_grad else None)
        ctx.spec, ctx.backend, ctx.N = spec, backend, x.shape[0]
        return loss, rows if keep_rows else None

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_rows: Tensor | None) -> Gradients:
        """Make dx of the coefficients and the upstream gradient."""
        x, beta, mean, scale, dbeta = ctx.saved_tensors
        dx = db = None
        if g is not None and torch.is_grad_enabled():
            dx, db = _differentiable(x, beta, ctx.spec, ctx.needs_input_grad, g)
            dx = _padded(dx, ctx.N)
        elif g is not None:
            if ctx.needs_input_grad[0]:
                coefficients, g_one = _with_upstream(Coefficients(mean, scale), g)
                dx = ctx.backend.moments_dx(x, coefficients, g_one, ctx.spec.sub_batches, ctx.N)
            db = _beta_gradient(beta, dbeta, g)
        return _sum(dx, _padded(g_rows, ctx.N)), db, None, None, None


class ActivationSettings(NamedTuple):
    """One argument for all that is no tensor: PyTorch looks at each argument of an autograd function."""

    activation: Activation
    spec: LossSpec
    backend: Backend
    injection: Injection | None


class ActivationAndLoss(torch.autograd.Function):
    """Activation and loss from one read of x; one kernel adds both gradients in backward.

    Where ``saving.output_and_rows`` says so, the rows that take part are a third output, by which a second derivative
    reaches x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor | None, settings: ActivationSettings) -> tuple[Tensor | None, ...]:
        """Return y, the loss and the saved rows. With an injected loss, also a detached alias of y, which is saved."""
        ctx.set_materialize_grads(False)
        activation, spec, backend, injection = ctx.settings = settings
        ctx.from_output = ctx.needs_input_grad[0] and saving.output_and_rows(x, spec, activation)
        beta_grad = ctx.needs_input_grad[1]
        y, loss, (mean, scale, _), dbeta, rows = backend.activation(
            x, beta, spec, activation, beta_grad, ctx.from_output
        )
        saved_rows = rows if ctx.from_output else None
        # Second derivatives come through an alias of y: a gradient of y itself starts the injected loss.
        alias = y.detach() if ctx.from_output and injection is not None else None
        saved = x if not ctx.from_output else y if alias is None else alias
        ctx.save_for_backward(saved, saved_rows, beta, mean, scale, dbeta if beta_grad else None)
        if injection is not None:
            ctx.mark_non_differentiable(loss)
        elif not ctx.needs_input_grad[0]:  # beta alone is learnt: y is no function of it
            ctx.mark_non_differentiable(y)
        return (y, loss, saved_rows) if alias is None else (y, loss, saved_rows, alias)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, g: Tensor | None, g_rows: Tensor | None, g_alias: Tensor | None = None
    ) -> Gradients:
        """dx = dy · activation' + g · scale · (x - mean)."""
        tensor, rows, beta, mean, scale, dbeta = ctx.saved_tensors
        activation, spec, backend, injection = ctx.settings
        if injection is not None and dy is not None:
            g = injection.upstream(dy)
        dy, N = _sum(dy, g_alias), tensor.shape[0]
        dx = db = None
        if torch.is_grad_enabled():
            if g is not None:
                x = tensor if rows is None else rows
                dx, db = _differentiable(x, beta, spec, ctx.needs_input_grad, g)
                dx = _padded(dx, N)
            if dy is not None and ctx.needs_input_grad[0]:
                of_y = reference.activation_gradient(tensor, dy, activation, from_output=ctx.from_output)
                dx = _sum(dx, of_y)
        else:
            if ctx.needs_input_grad[0] and not (dy is None and g is None):
                coefficients, g_one = _with_upstream(Coefficients(mean, scale), g)
                saved = Saved(tensor, rows, ctx.from_output)
                dx = backend.activation_dx(saved, dy, coefficients, g_one, activation, spec.sub_batches, N)
            db = None if g is None else _beta_gradient(beta, dbeta, g)
        return _sum(dx, _padded(g_rows, N)), db, None


class Moments(torch.autograd.Function):
    """Mean and unbiased variance of each sub-batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sub_batches: SubBatches, backend: Backend) -> tuple[Tensor, Tensor]:
        """Save x and the means."""
        ctx.set_materialize_grads(False)
        mean, var = backend.moments(x, sub_batches)
        ctx.save_for_backward(x, mean)
        ctx.sub_batches, ctx.backend = sub_batches, backend
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dvar: Tensor | None) -> Gradients:
        """dx = dvar · 2 / (M - 1) · (x - mean) + dmean / M."""
        x, mean = ctx.saved_tensors
        n, _, per_activation = ctx.sub_batches
        if dmean is None and dvar is None:
            return None, None, None
        if torch.is_grad_enabled():
            outputs = reference.moments(x, ctx.sub_batches)
            pairs = [(o, g) for o, g in zip(outputs, (dmean, dvar), strict=True) if g is not None]
            (dx,) = torch.autograd.grad([o for o, _ in pairs], [x], [g for _, g in pairs], create_graph=True)
            return dx, None, None
        M = n if per_activation else n * (x[0, 0].numel())
        scale = torch.zeros_like(mean) if dvar is None else dvar * (2 / (M - 1))
        coefficients = Coefficients(mean, scale, None if dmean is None else dmean / M)
        return ctx.backend.moments_dx(x, coefficients, None, ctx.sub_batches, x.shape[0]), None, None


def _differentiable(
    x: Tensor, beta: Tensor | None, spec: LossSpec, needed: tuple[bool, ...], g: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by x and beta as functions that can be differentiated again, from the reference."""
    value = reference.loss(x, beta, spec)
    inputs = [t for t, wanted in zip((x, beta), needed, strict=False) if wanted and t is not None]
    found = iter(torch.autograd.grad(value, inputs, g, create_graph=True))
    return next(found) if needed[0] else None, next(found) if needed[1] else None


def _with_upstream(coefficients: Coefficients, g: Tensor | None) -> tuple[Coefficients, Tensor | None]:
    """Return coefficients and one upstream value, by which kernels multiply.

    An upstream gradient with a value for each unit is multiplied into the scale instead.
    """
    if g is None or g.dim() == 0:
        return coefficients, g
    return Coefficients(coefficients.mean, coefficients.scale * g), g.new_ones(())


def _padded(rows: Tensor | None, count: int) -> Tensor | None:
    """Return ``rows`` followed by rows of zeros, ``count`` in all."""
    if rows is None or rows.shape[0] == count:
        return rows
    return torch.cat([rows, torch.zeros_like(empty_rows(rows, count - rows.shape[0]))])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _beta_gradient(beta: Tensor | None, dbeta: Tensor | None, g: Tensor) -> Tensor | None:
    if beta is None or dbeta is None:
        return None
    dbeta = dbeta * g if is_traced(g) or keeps_graph() or not _is_one(g) else dbeta
    return dbeta.sum() if dbeta.dim() > beta.dim() else dbeta


def _is_one(g: Tensor) -> bool:
    """Whether ``g`` is known to be 1 without a look at a device; a tensor of a subclass has no value."""
    return type(g) is Tensor and g.dim() == 0 and g.device.type == "cpu" and g.item() == 1.0


def _multiplied(dx: Tensor, g: Tensor, backend: Backend) -> Tensor:
    """Return dx · g, in dx itself unless the graph stays for another backward."""
    if g.dim() == 1:
        g = g.view(-1, *[1] * (dx.dim() - 2))
    if is_traced(g):
        return (dx * g).to(dx.dtype)
    if keeps_graph():
        return torch.mul(dx, g, out=torch.empty_like(dx))
    if dx.device.type != "cpu" and g.dim() == 0:
        backend.multiply_(dx, g)
        return dx
    return dx if _is_one(g) else dx.mul_(g)

"""The autograd functions around the ops: which gradient is computed when, and what is kept until then.

The first derivative is the kernels'; a backward that is itself differentiated (``create_graph=True``) goes
through the reference, so that second derivatives are exact. A ``backend`` is a namespace with the ops' names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .geometry import accumulation_dtype, empty_rows
from .options import Activation, LossSpec
from .transforms import in_functorch


def loss(x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Any) -> Tensor:
    """Differentiable loss of ``x``, which lies in a supported layout."""
    if not wants_gradient(x, beta):
        return backend.loss(x, beta, *spec)
    if _chosen(2 * spec.K * spec.n <= x.shape[0]):
        return DeferredLoss.apply(x, beta, spec, backend, True)[0]
    # float16: scaling by the upstream gradient (a GradScaler's) must come before rounding, or small values
    # vanish. Units that do not fit on chip or in a cache: x is read twice in any case, and then once the upstream is
    # known. Nor is dx made for a beta that alone is learnt. An export chooses nothing by sizes.
    deferred = x.dtype == torch.float16 or not x.requires_grad or torch.compiler.is_exporting()
    if deferred or not backend.one_pass(x, spec.n, spec.K, spec.per_activation):
        return DeferredLoss.apply(x, beta, spec, backend, False)[0]
    return OnePassLoss.apply(x, beta, spec, backend)


def wants_gradient(x: Tensor, beta: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and (x.requires_grad or (beta is not None and beta.requires_grad))


class OnePassLoss(torch.autograd.Function):
    """Loss and gradient in one pass over x; nothing is left for backward if the upstream gradient is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor | None, spec: LossSpec, backend: Any) -> Tensor:
        """Save dx for an upstream gradient of 1, and x for a second derivative."""
        loss, dx, dbeta = backend.loss_dx(x, beta, *spec, ctx.needs_input_grad[1])
        ctx.save_for_backward(x, beta, dx, dbeta)
        ctx.spec, ctx.backend = spec, backend
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what forward computed."""
        x, beta, dx, dbeta = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(x, beta, ctx.spec, ctx.needs_input_grad, g), None, None
        if ctx.needs_input_grad[0]:
            dx = _scaled(dx, g, ctx.backend)
        return dx, _beta_gradient(ctx, beta, dbeta, g), None, None


class DeferredLoss(torch.autograd.Function):
    """Loss now; in backward dx = g · scale · (x - mean), rounded once.

    ``keep_rows``: only the rows that take part are kept, as a second output (so that a second derivative
    reaches x through it). Otherwise x is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beta: Tensor | None,
        spec: LossSpec,
        backend: Any,
        keep_rows: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Save the rows that take part and the (K, U) coefficients."""
        ctx.set_materialize_grads(False)
        loss, mean, scale, dbeta, rows = backend.loss_coefficients(x, beta, *spec, ctx.needs_input_grad[1], keep_rows)
        ctx.save_for_backward(rows if keep_rows else x, beta, mean, scale, dbeta)
        ctx.spec, ctx.backend, ctx.rows = spec, backend, x.shape[0]
        return loss, rows if keep_rows else None

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_rows: Tensor | None) -> tuple[Tensor | None, ...]:
        """Apply the coefficients, with the upstream gradient in them."""
        spec = ctx.spec
        kept, beta, mean, scale, dbeta = ctx.saved_tensors
        dx = db = None
        if g is not None and torch.is_grad_enabled():
            dx, db = _differentiable(kept, beta, spec, ctx.needs_input_grad, g)
            dx = None if dx is None else _padded(dx, ctx.rows)
        elif g is not None:
            if ctx.needs_input_grad[0]:
                scale, g_one = _with_upstream(scale, g)
                dx = ctx.backend.moments_dx(kept, mean, scale, None, g_one, spec.n, ctx.rows, spec.per_activation)
            db = _beta_gradient(ctx, beta, dbeta, g)
        if g_rows is not None:  # a second derivative by way of the kept rows
            dx = _padded(g_rows, ctx.rows) if dx is None else dx + _padded(g_rows, ctx.rows)
        return dx, db, None, None, None


class Injection(NamedTuple):
    """How a loss that nobody differentiates enters the graph: by the backward of what is made from y."""

    scaler: torch.amp.GradScaler | None = None  # that of the objective

    def upstream(self, x: Tensor) -> Tensor:
        """Return the loss's upstream gradient: 1, times the scale."""
        one = torch.ones((), dtype=accumulation_dtype(x.dtype), device=x.device)
        return one if self.scaler is None else self.scaler.scale(one)


def injected(y: Tensor, loss: Tensor, injection: Injection) -> tuple[Tensor, Tensor]:
    """Put ``loss`` into the graph of ``y``; return y and the loss detached."""
    if in_functorch():  # where a loss inside vmap does not tell whether it requires a gradient
        return InjectLossInFunctorch.apply(y, loss, injection), loss.detach()
    return (InjectLoss.apply(y, loss, injection) if loss.requires_grad else y), loss.detach()


class InjectLoss(torch.autograd.Function):
    """The identity on y, whose backward starts that of ``loss``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, injection: Injection) -> Tensor:
        """Return y."""
        ctx.injection = injection
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """Pass dy on."""
        return dy, ctx.injection.upstream(dy), None


class InjectLossInFunctorch(InjectLoss):
    """The same in the form that ``torch.func`` wants, which takes longer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, loss: Tensor, injection: Injection) -> Tensor:  # type: ignore[override]
        """Return y."""
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Injection], output: Tensor) -> None:
        """Keep the injection."""
        ctx.injection = inputs[2]


class ActivationAndLoss(torch.autograd.Function):
    """Activation and loss from one read of x; the loss's gradient rides on the activation's.

    Saved is one tensor of x's size, as by the bare activation: y where the derivative follows from it and the
    rows that take part in the loss, few, are kept beside it (the third output, by which a second derivative
    reaches x); else x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beta: Tensor | None,
        how: tuple[Activation, LossSpec, Any, Injection | None],  # one argument: PyTorch looks at each
    ) -> tuple[Tensor | None, ...]:
        """Return y, the loss, the rows that are kept; with an injected loss also an alias of y, which is then saved."""
        ctx.set_materialize_grads(False)
        activation, spec, backend, injection = ctx.how = how
        ctx.keep_rows = ctx.needs_input_grad[0] and activation.from_output and _few(spec, x.shape[0])
        y, loss, mean, scale, dbeta, kept = backend.activation(
            x, beta, *spec, ctx.needs_input_grad[1], *activation, ctx.keep_rows
        )
        rows = kept if ctx.keep_rows else None
        # an output of its own, by which a second derivative comes: what comes by y has the loss injected
        again = y.detach() if ctx.keep_rows and injection is not None else None
        saved = y if again is None else again
        ctx.save_for_backward(saved if ctx.keep_rows else x, rows, beta, mean, scale, dbeta)
        if injection is not None:
            ctx.mark_non_differentiable(loss)
        elif not ctx.needs_input_grad[0]:  # beta alone is learnt: y is no function of it
            ctx.mark_non_differentiable(y)
        return (y, loss, rows) if again is None else (y, loss, rows, again)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, g: Tensor | None, g_rows: Tensor | None, dy_again: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """dx = dy · activation' + g · scale · (x - mean)."""
        saved, rows, beta, mean, scale, dbeta = ctx.saved_tensors
        kept = saved if rows is None else rows
        activation, spec, backend, injection = ctx.how
        N = saved.shape[0]
        if injection is not None and dy is not None:
            g = injection.upstream(dy)
        if dy_again is not None:
            dy = dy_again if dy is None else dy + dy_again
        dx = db = None
        if torch.is_grad_enabled():
            if g is not None:
                dx, db = _differentiable(kept, beta, spec, ctx.needs_input_grad, g)
                dx = None if dx is None else _padded(dx, N)
            if dy is not None and ctx.needs_input_grad[0]:
                part = reference.activation_gradient(saved, dy, activation, from_output=ctx.keep_rows)
                dx = part if dx is None else dx + part
        else:
            if ctx.needs_input_grad[0] and not (dy is None and g is None):
                scale, g_one = (scale, None) if g is None else _with_upstream(scale, g)
                dx = backend.activation_dx(
                    saved, ctx.keep_rows, rows, dy, mean, scale, g_one, spec.n, N, spec.per_activation, *activation
                )
            db = None if g is None else _beta_gradient(ctx, beta, dbeta, g)
        if g_rows is not None:  # a second derivative by way of the kept rows
            dx = _padded(g_rows, N) if dx is None else dx + _padded(g_rows, N)
        return dx, db, None


class Moments(torch.autograd.Function):
    """Mean and unbiased variance of each sub-batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, K: int, per_activation: bool, backend: Any) -> tuple[Tensor, Tensor]:
        """Save x and the means."""
        ctx.set_materialize_grads(False)
        mean, var = backend.moments(x, n, K, per_activation)
        ctx.save_for_backward(x, mean)
        ctx.args, ctx.backend = (n, K, per_activation), backend
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dvar: Tensor | None) -> tuple[Tensor | None, ...]:
        """dx = dvar · 2/(M-1) · (x - mean) + dmean / M."""
        x, mean = ctx.saved_tensors
        n, K, per_activation = ctx.args
        if dmean is None and dvar is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():
            outputs = reference.moments(x, n, K, per_activation)
            given = [(o, g) for o, g in zip(outputs, (dmean, dvar), strict=True) if g is not None]
            (dx,) = torch.autograd.grad([o for o, _ in given], [x], [g for _, g in given], create_graph=True)
            return dx, None, None, None, None
        M = n if per_activation else n * (x[0, 0].numel())
        scale = torch.zeros_like(mean) if dvar is None else dvar * (2 / (M - 1))
        shift = None if dmean is None else dmean / M
        dx = ctx.backend.moments_dx(x, mean, scale, shift, None, n, x.shape[0], per_activation)
        return dx, None, None, None, None


def _differentiable(
    x: Tensor, beta: Tensor | None, spec: LossSpec, needed: tuple[bool, ...], g: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by x and beta as functions that can be differentiated again, from the reference."""
    value = reference.loss(x, beta, spec)
    inputs = [t for t, wanted in zip((x, beta), needed, strict=False) if wanted and t is not None]
    found = iter(torch.autograd.grad(value, inputs, g, create_graph=True))
    return next(found) if needed[0] else None, next(found) if needed[1] else None


def _few(spec: LossSpec, rows: int) -> bool:
    """Whether rows that take part are few enough to be kept beside y."""
    return _chosen(spec.K * spec.n <= rows // 2) or (_chosen(spec.K == 2) and _chosen(2 * spec.n < rows))


def _chosen(condition: bool | torch.SymBool) -> bool:
    """Take the path of ``condition``; an export with a symbolic size takes the other, which is right for all sizes."""
    if type(condition) is bool:
        return condition
    return not torch.compiler.is_exporting() and bool(condition)


def _with_upstream(scale: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and an upstream gradient of one value, which kernels multiply; one for each unit goes to scale."""
    if g.dim() == 0:
        return scale, g
    return scale * g, g.new_ones(())


def _padded(rows: Tensor, count: int) -> Tensor:
    """Return ``rows`` followed by rows of zeros, ``count`` in all."""
    if rows.shape[0] == count:
        return rows
    return torch.cat([rows, torch.zeros_like(empty_rows(rows, count - rows.shape[0]))])


def _beta_gradient(ctx: Any, beta: Tensor | None, dbeta: Tensor, g: Tensor) -> Tensor | None:
    if beta is None or not ctx.needs_input_grad[1]:
        return None
    dbeta = dbeta * g if _traced(g) or _kept() or not _is_one(g) else dbeta
    return dbeta.sum() if dbeta.dim() > beta.dim() else dbeta


def _is_one(g: Tensor) -> bool:
    """Whether ``g`` is known to be 1 without a look at a device; a tensor of a subclass has no value."""
    return type(g) is Tensor and g.dim() == 0 and g.device.type == "cpu" and g.item() == 1.0


def _traced(g: Tensor) -> bool:
    """Whether ``g`` stands for other values too: for a compiler, ``make_fx``, ``vmap`` or ``is_grads_batched``."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_legacy_batchedtensor(g)
        or torch._C._functorch.is_functorch_wrapped_tensor(g)
    )


def _kept() -> bool:
    """Whether the graph is kept for another backward, so that what was saved must stay as it is."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _scaled(dx: Tensor, g: Tensor, backend: Any) -> Tensor:
    """dx · g; dx itself is used up unless the graph is kept for another backward."""
    if g.dim() == 1:
        g = g.view(-1, *[1] * (dx.dim() - 2))
    if _traced(g):
        return (dx * g).to(dx.dtype)
    if _kept():
        return torch.mul(dx, g, out=torch.empty_like(dx))
    if dx.device.type != "cpu" and g.dim() == 0:
        backend.multiply_(dx, g)
        return dx
    return dx if _is_one(g) else dx.mul_(g)

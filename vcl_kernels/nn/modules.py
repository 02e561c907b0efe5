"""VCL as modules, alone or with an activation. They hold beta, and the loss of the latest training forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .. import reference
from ..checks import (
    channels_first,
    check_activation,
    check_beta,
    check_channel_dim,
    check_choice,
    check_count,
    check_dimensions,
    check_dtype,
    check_loss,
    check_number,
    check_tensor,
)
from ..functional import activation_and_loss
from ..geometry import accumulation_dtype, unit_shape
from ..injection import Injection, injected
from ..options import (
    BACKENDS,
    FORMS,
    NO_MINIMUM,
    UNITS,
    ActivationName,
    Approximate,
    BackendName,
    BetaMode,
    Form,
    Unit,
)
from ..torch_private import in_backward, in_functorch
from .beta import fitting_beta, said, why_not_loaded
from .latest import LatestForward
from .steering import Steering

__all__ = ["VCL", "VCLActivation"]

SHORT_CALLS = 4  # calls in a row that may be short after others: of the last batch a model may make several


class VCLActivation(nn.Module):
    r"""An activation function that keeps the variance constancy loss of its input; in evaluation the bare function.

    ``y = activation(x)``, and :attr:`loss` is ``weight`` times :func:`vcl_kernels.vcl_loss` of x, by default in
    activation units, in the latest training forward. A learned or running beta acts as ``max(beta, beta_min)`` (its
    gradient below that only raises it). Both come from :func:`vcl_kernels.vcl_activation`.

    Args:
        activation: ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        units: shape of a learned beta: C for channel units, ``(C, *spatial)`` for activation units, ``()`` for one.
            Naming it makes beta learned. None, with ``beta_mode="learned"``: taken from the first training forward
            (create the optimizer after that, or name the shape).
        alpha, negative_slope, approximate: of elu, leaky_relu and gelu, as for :func:`vcl_kernels.vcl_activation`.
        sub_batch_size: n, samples in a sub-batch. A training batch of fewer than 2n has loss 0, and a
            :class:`vcl_kernels.VCLWarning` says so; a few such forwards after others, the last batch of an epoch, are
            not told.
        form: ``"ratio"``, ``"variance"`` (which has no beta) or ``"relative_variance"``.
        unit: ``"channel"`` or ``"activation"``.
        num_sub_batches: K, or as many as the batch has where those are fewer; default 2 for ``"ratio"``, all for the
            others.
        weight: multiplies the loss.
        beta_mode: ``"learned"``: beta is a parameter, one for each unit. ``"fixed"``: it stays at ``beta_init``.
            ``"running"``: it is one buffer for all units, and follows their mean variance v̄ in the batch: at each
            training forward ``beta = (1 - m) beta + m v̄ / variance_over_beta(M)``, m = ``beta_momentum``, with
            :func:`vcl_kernels.scale.variance_over_beta`; the first batch sets it. Then the ratio asks for constancy
            alone, and not for a scale. Default: ``"learned"`` where ``units`` is given, else ``"fixed"``.
            ``"variance"`` has no beta.
            A running beta is saved in the state dict. As batch norm's running variance, it is that of rank 0 under
            DistributedDataParallel, which sends buffers at each forward; under FSDP each rank has its own.
        beta_init: first value of beta, learned or fixed. Default 1.0 for the ratio and 1e-5 for
            ``"relative_variance"``.
        beta_momentum: of a running beta, the weight of the present batch; default 0.1.
        beta_min: a learned or running beta acts as at least this.
        inject: the loss enters the graph through the output, so that ``backward`` of whatever is made from it adds
            the loss's gradient; :attr:`loss` is then detached. Set :attr:`grad_scaler` where one scales the loss.
        channel_dim: where x has its channels: -1 for ``(N, L, C)``, as linear layers of a transformer make them, and
            ``(N, H, W, C)``. Such x is read and y written where they lie; ``units`` has C first all the same.
        backend: as for :func:`vcl_kernels.vcl_loss`.

    Shape: any ``(N, C, *spatial)``, or with its channels at ``channel_dim``, kept.

    Raises:
        TypeError, ValueError: an unknown activation, form, unit or backend, sub_batch_size or num_sub_batches too
            small, a channel_dim that x does not have or that is 0.

    >>> import torch
    >>> act = VCLActivation("elu", weight=0.01)
    >>> y = act(torch.randn(32, 16, 8, 8))
    >>> act.loss.shape
    torch.Size([])
    """

    def __init__(  # noqa: PLR0913  # the public signature
        self,
        activation: ActivationName,
        units: int | tuple[int, ...] | None = None,
        *,
        alpha: float = 1.0,
        negative_slope: float = 0.01,
        approximate: Approximate = "none",
        sub_batch_size: int = 5,
        form: Form = "ratio",
        unit: Unit = "activation",
        num_sub_batches: int | None = None,
        weight: float = 1.0,
        beta_mode: BetaMode | None = None,
        beta_init: float | None = None,
        beta_momentum: float | None = None,
        beta_min: float = 1e-3,
        inject: bool = False,
        channel_dim: int = 1,
        backend: BackendName | None = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation, alpha, negative_slope, approximate)
        check_choice("form", form, FORMS)
        check_choice("unit", unit, UNITS)
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        check_count("sub_batch_size", sub_batch_size, 1)
        if num_sub_batches is not None:
            check_count("num_sub_batches", num_sub_batches, 2)
        for name, value in (("weight", weight), ("beta_min", beta_min)):
            check_number(name, value)
        check_channel_dim(channel_dim)
        self.sub_batch_size, self.form, self.unit, self.num_sub_batches = sub_batch_size, form, unit, num_sub_batches
        self.first_weight = self.weight = weight
        if units is not None and form != "variance":
            beta_mode = beta_mode or "learned"
        self.beta_mode, self.beta_init, self.beta_momentum = check_beta(form, beta_mode, beta_init, beta_momentum)
        if units is not None and self.beta_mode != "learned" and form != "variance":
            raise ValueError(f"units is the shape of a learned beta; got units={units} with beta_mode={beta_mode!r}")
        self.beta_min = beta_min
        self.channel_dim, self.backend = channel_dim, backend
        self.steering = Steering(inject)
        self.place = ""  # its name in a model, told by attach
        self.sums_calls = False  # of one forward, where several calls share beta
        self.latest = LatestForward()
        self.beta: nn.Parameter | Tensor | None
        if self.beta_mode == "running":
            self.register_buffer("beta", torch.tensor(math.nan))
        elif self.beta_mode == "fixed":
            self.register_parameter("beta", None)
        elif units is None:
            self.register_parameter("beta", nn.UninitializedParameter())  # type: ignore[arg-type]
        else:
            shape = (units,) if isinstance(units, int) else units
            self.beta = nn.Parameter(
                torch.full(shape, self.beta_init, dtype=accumulation_dtype(torch.get_default_dtype()))
            )

    @property
    def loss(self) -> Tensor | None:
        """``weight`` times the loss of the latest training forward."""
        self.steering.ever_read = True
        return self.latest.loss

    def save_beta(self) -> None:
        """Keep a fixed beta as a buffer, so that it is saved: it was measured."""
        del self.beta
        self.register_buffer("beta", torch.tensor(float(self.beta_init)))

    @property
    def least_beta(self) -> float:
        """What beta acts as at least: a fixed one acts as it is."""
        return NO_MINIMUM if self.beta_mode == "fixed" else self.beta_min

    @property
    def inject(self) -> bool:
        """Whether the loss enters the graph through the output."""
        return self.steering.inject

    @inject.setter
    def inject(self, inject: bool) -> None:
        self.steering.inject = inject

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler that scales the objective, for ``inject=True``. None, once set, says that there is none."""
        return self.steering.grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        self.steering.grad_scaler = scaler

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x. In training, also compute the loss of x."""
        if not self.training:
            return reference.activate(x, self.activation)
        compiling = torch.compiler.is_compiling()
        if compiling and in_functorch():
            raise RuntimeError(
                "a VCL module cannot be compiled inside a torch.func transform, for its loss outlives the transform; "
                "compile vcl_loss or vcl_activation there, or transform the module in eager code"
            )
        latest, steering = self.latest, self.steering
        latest.in_grad_mode = torch.is_grad_enabled()
        check_tensor("x", x)
        injection = None
        if steering.inject:
            injection = steering.injection()
            if x.dtype is torch.float16 and not steering.grad_scaler_told and latest.in_grad_mode:
                self._warn_of_scaler()
        if not x.shape or x.shape[0] < 2 * self.sub_batch_size:
            y, loss = self._with_zero_loss(x, injection)
            latest.record(loss, self.sums_calls)
            return y
        latest.had_rows = True
        latest.short = 0
        view = channels_first(x, self.channel_dim)  # x itself where that is 1
        K = None if self.num_sub_batches is None else min(self.num_sub_batches, x.shape[0] // self.sub_batch_size)
        weight, factor = self.weight * steering.weight, 1.0
        if compiling:  # an op's numbers are constants of the graph: a change is a factor beside it
            first = self.first_weight * steering.first_weight or 1.0
            weight, factor = first, weight / first
            injection = None if injection is None else injection._replace(weight=factor)
        beta, spec = check_loss(
            view, self._beta_for(view), self.sub_batch_size, self.form, self.unit, K, "mean", weight, self.least_beta
        )
        y, loss = activation_and_loss(view, beta, spec, self.activation, self.backend, injection)
        latest.record(loss if factor == 1.0 else loss * factor, self.sums_calls)
        if view is x:
            return y
        return x if y is view else y.movedim(1, self.channel_dim)

    def _warn_of_scaler(self) -> None:
        self.steering.warn(
            "scaler",
            f"{self._named()} has a float16 input, and handle.grad_scaler is not set. With inject=True the unscaling "
            "of a GradScaler divides the gradient of VCL by the scale. Set handle.grad_scaler = scaler "
            "(vcl.grad_scaler where there is no handle), or None if the objective is not scaled",
        )

    def _warn_of_rows(self, x: Tensor) -> None:
        latest = self.latest
        if not latest.in_grad_mode:  # a policy acts on a row or few
            return
        if latest.had_rows:  # the last batch of an epoch is often short
            if not self.sums_calls or latest.loss is None:  # of a forward's calls the first counts
                latest.short += 1
            if latest.short <= SHORT_CALLS:
                return
            latest.had_rows = False
        # A compiler whose sizes are symbols has no text for them
        seen = "an input" if torch.compiler.is_compiling() else f"an input of shape {tuple(x.shape)}"
        self.steering.warn(
            "rows",
            f"{self._named()} got {seen} in training: fewer than 2 * sub_batch_size = "
            f"{2 * self.sub_batch_size} rows in dimension 0. Its VCL loss is 0"
            f"{'' if self.beta_mode == 'fixed' else ', and beta does not move'}. Take larger batches or a smaller "
            "sub_batch_size",
        )

    def _named(self) -> str:
        return f"layer {self.place!r}" if self.place else type(self).__name__

    def _with_zero_loss(self, x: Tensor, injection: Injection | None) -> tuple[Tensor, Tensor]:
        """Return the activation of a batch that is too short for a loss, and a loss of 0."""
        check_dtype("x", x.dtype)
        check_dimensions(x.shape)
        self._warn_of_rows(x)
        loss = x.new_zeros((), dtype=accumulation_dtype(x.dtype))
        if isinstance(self.beta, nn.Parameter) and type(self.beta) is not UninitializedParameter:
            loss = loss + 0 * self.beta.sum()  # DistributedDataParallel waits for a gradient
        y = reference.activate(x, self.activation)
        return (y, loss) if injection is None else injected(y, loss, injection)

    def _beta_for(self, x: Tensor) -> Tensor | float | None:
        """Return the argument ``beta`` for x, whose channels are in dimension 1. A beta without a shape gets it now."""
        beta, wide = self.beta, accumulation_dtype(x.dtype)
        if self.beta_mode == "running":
            return self._running_beta(x).to(wide)
        if beta is None:
            return None if self.form == "variance" else self.beta_init
        if type(beta) is UninitializedParameter:  # isinstance takes longer, through a metaclass
            check_dimensions(x.shape)
            if x.device != beta.device and "meta" in (x.device.type, beta.device.type):
                raise ValueError(f"beta must be on x's device, {x.device}; got {beta.device}")
            self._make_beta(unit_shape(x.shape, self.unit == "activation"), wide, x.device)
        if self.beta_mode == "learned" and beta.shape:
            units = unit_shape(x.shape, self.unit == "activation")
            if units and tuple(beta.shape) != units:
                raise ValueError(
                    f"{self._named()} has a learned beta of shape {tuple(beta.shape)}, and an input whose units are "
                    f"{units}. For inputs of several sizes take unit='channel', or beta_mode='fixed' or 'running'"
                )
        if self.beta_mode == "fixed":  # a buffer, which is changed in place where it is loaded or sent
            return beta.to(wide, copy=True)
        return beta if beta.dtype in (wide, x.dtype) else beta.to(wide)  # x may be float32 in a bfloat16 model

    def _running_beta(self, x: Tensor) -> Tensor:
        """Let the running beta follow x; return its value as a tensor of its own, which backward may save.

        A checkpoint's recomputation does not move it again, and gets what the latest forward had: call backward
        before the next forward.
        """
        beta = self.beta
        assert beta is not None
        if beta.is_meta and not x.is_meta:
            raise ValueError(
                f"beta must be on x's device, {x.device}; got meta. Call to_empty and reset_parameters first"
            )
        if beta.device != x.device:
            beta = self.beta = beta.to(x.device)
        if self._runs_again():
            return beta.clone()
        followed = self.followed(x)
        if not in_functorch():  # which forbids what outlives the transform
            beta.copy_(followed)
        return followed

    def _runs_again(self) -> bool:
        """Whether a checkpoint runs a forward of this VCL again. In a reentrant one attach leaves out the first run."""
        first_now = self.steering.attached and not self.steering.in_forward and self.latest.acts is None
        return in_backward() and not first_now

    @torch.no_grad()
    def followed(self, x: Tensor) -> Tensor:
        """Return the running beta after a batch x, whose channels are in dimension 1; nothing changes."""
        beta = self.beta
        assert beta is not None
        fits = fitting_beta(x, self.sub_batch_size, self.unit, self.num_sub_batches, self.backend).to(beta)
        return torch.where(beta.isfinite(), beta.lerp(fits, self.beta_momentum), fits)

    def materialize(self, x: Tensor) -> VCLActivation:
        """Give a beta without a shape that of a training forward of ``x``, on x's device; return the module."""
        if self.beta is not None and not isinstance(self.beta, nn.Parameter):
            self.beta = self.beta.to(x.device, accumulation_dtype(x.dtype))
        if type(self.beta) is UninitializedParameter:
            view = channels_first(x, self.channel_dim)
            check_dimensions(view.shape)
            shape, wide = unit_shape(view.shape, self.unit == "activation"), accumulation_dtype(x.dtype)
            self.beta = nn.Parameter(torch.full(shape, self.beta_init, dtype=wide, device=x.device))
        return self

    def reset_parameters(self) -> None:
        """Set beta to its first value, as after ``to_empty``; a beta without a shape stays so."""
        if self.beta is not None and type(self.beta) is not UninitializedParameter:
            nn.init.constant_(self.beta, math.nan if self.beta_mode == "running" else self.beta_init)

    def _make_beta(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> None:
        assert isinstance(self.beta, UninitializedParameter)
        self.beta.materialize(shape, device, dtype)
        nn.init.constant_(self.beta, self.beta_init)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A beta without a shape is saved as it is: it cannot be detached.
        super()._save_to_state_dict(destination, prefix, keep_vars or type(self.beta) is UninitializedParameter)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + "beta")
        if loaded is None and self.steering.attached:  # the checkpoint is of the plain model: beta stays as it is
            return
        if type(self.beta) is UninitializedParameter and loaded is not None:
            if type(loaded) is UninitializedParameter:
                return
            if not loaded.dim():
                args[-1].append(f"{prefix}beta is one value for a layer; this one is learned, one for each unit")
                return
            self._make_beta(tuple(loaded.shape), loaded.dtype)
        if loaded is not None:
            args[-1].extend(why_not_loaded(loaded, prefix + "beta", self.beta, self.beta_mode, strict=args[1]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VCLActivation:
        """Move beta where the module goes, but not to half precision: a step of 1e-3 from 1 would round to none."""

        def apply(t: Tensor) -> Tensor:
            moved = fn(t)
            loses = moved.dtype in (torch.bfloat16, torch.float16) and t.dtype in (torch.float32, torch.float64)
            return t.to(moved.device) if loses else moved

        return super()._apply(apply, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one step, so that a copy or a pickle can be made at any time."""
        return {**self.__dict__, "latest": LatestForward()}

    def _replicate_for_data_parallel(self) -> VCLActivation:
        replica = super()._replicate_for_data_parallel()
        replica.latest = LatestForward()
        return replica

    def extra_repr(self) -> str:
        """Return the settings."""
        lazy = type(self.beta) is UninitializedParameter
        shape = "from the first batch" if lazy else "" if self.beta is None else tuple(self.beta.shape)
        beta = shape if self.beta_mode == "learned" else said(self.beta, self.beta_mode, self.beta_init, self.form)
        activation = "" if self.activation.name == "identity" else f"{self.activation.name}, "
        weight = self.weight * self.steering.weight
        settings = f"form={self.form}, n={self.sub_batch_size}, unit={self.unit}, weight={weight:g}"
        channel_dim = "" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}"
        return f"{activation}{settings}, beta={beta}{channel_dim}"


class VCL(VCLActivation):
    r"""Passes x through and keeps its variance constancy loss: :class:`VCLActivation` without an activation.

    For places before which no activation stands, and activations that are not fused. Takes ``units`` and the
    keyword arguments of :class:`VCLActivation` but those of activations.

    >>> import torch
    >>> vcl = VCL(weight=0.01)
    >>> x = torch.randn(32, 16, 8, 8)
    >>> vcl(x) is x
    True
    """

    def __init__(self, units: int | tuple[int, ...] | None = None, **settings: Any) -> None:
        super().__init__("identity", units, **settings)

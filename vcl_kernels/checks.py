"""The checks of arguments, before any work. Each error names the argument, what came and what is wanted."""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .geometry import accumulation_dtype, unit_shape
from .options import (
    ACTIVATIONS,
    BETA_MODES,
    BETA_MOMENTUM,
    DEFAULT_BETA,
    FORMS,
    NO_MINIMUM,
    REDUCTIONS,
    UNITS,
    Activation,
    BetaMode,
    LossSpec,
    SubBatches,
    number_of_sub_batches,
)

_ACTIVATION_NAMES = tuple(name for name in ACTIVATIONS if name != "gelu_tanh")  # that is gelu, approximate="tanh"


# Single arguments


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_integer(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an integer."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int; got {value!r} ({type(value).__name__})")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a number. A tensor of one value is none: it may change."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):  # Real is slow to ask
        raise TypeError(f"{name} must be a float; got {value!r} ({type(value).__name__})")


def check_channel_dim(channel_dim: object) -> None:
    """Raise unless ``channel_dim`` is an integer, and not 0."""
    check_integer("channel_dim", channel_dim)
    if channel_dim == 0:
        raise ValueError("channel_dim must not be 0, the dimension of samples")


def check_beta(
    form: str, mode: BetaMode | None, init: float | None, momentum: float | None
) -> tuple[BetaMode, float, float]:
    """Check how a module has its beta; return mode, first value and momentum."""
    check_choice("form", form, FORMS)
    if mode is not None:
        check_choice("beta_mode", mode, BETA_MODES)
        if mode != "fixed" and form == "variance":
            raise ValueError(f'form="variance" has no beta; got beta_mode={mode!r}')
        if mode == "running" and form != "ratio":
            raise ValueError(f'beta_mode="running" is for form="ratio", whose beta sets a scale; got form={form!r}')
    chosen: BetaMode = mode or "fixed"
    if init is not None:
        check_number("beta_init", init)
        if init < 0 or init == math.inf:  # NaN shows in the loss
            raise ValueError(f"beta_init must be finite and at least 0; got {init}")
        if chosen == "running":
            raise ValueError(f'beta_mode="running" takes no beta_init: the first batch sets it; got {init}')
    if momentum is not None:
        check_number("beta_momentum", momentum)
        if chosen != "running":
            raise ValueError(f'beta_momentum is for beta_mode="running"; got {momentum} with beta_mode={chosen!r}')
        if not 0 < momentum <= 1:
            raise ValueError(f"beta_momentum must be above 0 and at most 1; got {momentum}")
    return chosen, float(DEFAULT_BETA[form] if init is None else init), momentum or BETA_MOMENTUM


def check_activation(
    activation: str, alpha: float = 1.0, negative_slope: float = 0.01, approximate: str = "none"
) -> Activation:
    """Check the choice of an activation; return it as kernels take it."""
    check_choice("activation", activation, _ACTIVATION_NAMES)
    check_choice("approximate", approximate, ("none", "tanh"))
    check_number("alpha", alpha)
    check_number("negative_slope", negative_slope)
    parameter = {"elu": alpha, "leaky_relu": negative_slope}.get(activation, 0.0)
    name = "gelu_tanh" if activation == "gelu" and approximate == "tanh" else activation
    return Activation(ACTIVATIONS.index(name), float(parameter))


# Tensors


def channels_first(x: Tensor, channel_dim: int) -> Tensor:
    """Return ``x``, or a view of it with ``channel_dim`` as dimension 1: of ``(N, L, C)``, ``(N, C, L)``."""
    if channel_dim == 1:
        return x
    check_dimensions(x.shape)
    if not 1 - x.dim() <= channel_dim < x.dim():
        raise ValueError(f"channel_dim must be a dimension of x; got {channel_dim} for shape {tuple(x.shape)}")
    return x if channel_dim == 1 - x.dim() else x.movedim(channel_dim, 1)


def check_dimensions(shape: torch.Size) -> None:
    """Raise ValueError unless kernels take x of ``shape``."""
    if not 2 <= len(shape) <= 8:
        raise ValueError(f"x must have 2 to 8 dimensions (N, C, *spatial); got shape {tuple(shape)}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless kernels take ``dtype``."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {dtype}")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor with a shape, and its strides say where values lie."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    if type(value) in (UninitializedParameter, UninitializedBuffer):
        raise TypeError(f"{name} must be a Tensor with a shape; got {type(value).__name__}")
    _check_layout(name, torch.jagged if value.is_nested else value.layout)


def _check_layout(name: str, layout: torch.layout) -> None:
    if layout is not torch.strided:
        got = "a nested tensor" if layout is torch.jagged else f"one of layout {layout}"
        raise TypeError(f"{name} must be a dense Tensor, of layout torch.strided; got {got}")


class Metadata(NamedTuple):
    """What checks read of a tensor. It can be a key of a cache."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout

    @classmethod
    def of(cls, name: str, value: Tensor) -> Metadata:
        """Read it."""
        if not isinstance(value, Tensor):
            check_tensor(name, value)
        try:
            return cls(value.shape, value.dtype, value.device, value.layout)
        except RuntimeError:  # the tensor has no shape
            check_tensor(name, value)
            raise


# All arguments of a function


def check_moments(x: Tensor, sub_batch_size: int, unit: str, num_sub_batches: int | None) -> SubBatches:
    """Check the arguments of ``sub_batch_moments``; return how x is cut."""
    return _sub_batches(Metadata.of("x", x), sub_batch_size, unit, num_sub_batches)


def check_loss(
    x: Tensor,
    beta: float | Tensor | None,
    sub_batch_size: int,
    form: str,
    unit: str,
    num_sub_batches: int | None,
    reduction: str,
    weight: float = 1.0,
    beta_min: float = NO_MINIMUM,
) -> tuple[Tensor | None, LossSpec]:
    """Check the arguments of a loss; return beta, if it is a tensor, and everything else resolved."""
    arguments = (
        Metadata.of("x", x),
        Metadata.of("beta", beta) if isinstance(beta, Tensor) else beta,
        *(sub_batch_size, form, unit, num_sub_batches, reduction, weight, beta_min),
    )
    spec = None
    if not torch.compiler.is_compiling():
        try:
            spec = _cached_spec(*arguments)
        except TypeError:  # a symbolic size cannot be a key; nor some wrong arguments, which _loss_spec then names
            spec = None
    if spec is None:
        spec = _loss_spec(*arguments)
    if not isinstance(beta, Tensor):
        return None, spec
    return beta.float() if beta.dtype in (torch.bfloat16, torch.float16) else beta, spec


def _loss_spec(
    x: Metadata,
    beta: float | Metadata | None,
    sub_batch_size: int,
    form: str,
    unit: str,
    num_sub_batches: int | None,
    reduction: str,
    weight: float,
    beta_min: float,
) -> LossSpec:
    check_choice("form", form, FORMS)
    check_choice("reduction", reduction, REDUCTIONS)
    for name, value in (("weight", weight), ("beta_min", beta_min)):
        if isinstance(value, Tensor):  # no other type is refused: a compiler may have made the number a symbol
            check_number(name, value)
    if num_sub_batches is not None:
        check_count("num_sub_batches", num_sub_batches, 2)
    per_activation = _sub_batches(x, sub_batch_size, unit, num_sub_batches, of_loss=True).per_activation
    K = number_of_sub_batches(form, x.shape[0], sub_batch_size, num_sub_batches)
    value = _beta_value(x, beta, form, per_activation)
    factor = weight
    if reduction == "mean":
        units = math.prod(unit_shape(x.shape, per_activation))
        factor = weight / units if units else math.nan  # as torch.mean of nothing
    return LossSpec(value, beta_min, sub_batch_size, K, FORMS.index(form), per_activation, factor, reduction != "none")


_cached_spec = lru_cache(1024, typed=True)(_loss_spec)  # checks take longer than a small loss


def _sub_batches(
    x: Metadata, sub_batch_size: int, unit: str, num_sub_batches: int | None, *, of_loss: bool = False
) -> SubBatches:
    """Check what all functions share; K is the number asked for, or all."""
    _check_layout("x", x.layout)
    check_dtype("x", x.dtype)
    check_dimensions(x.shape)
    check_choice("unit", unit, UNITS)
    check_count("sub_batch_size", sub_batch_size, 1)
    if num_sub_batches is not None:
        check_count("num_sub_batches", num_sub_batches, 1)
    per_activation = unit == "activation"
    M = sub_batch_size * (1 if per_activation else math.prod(x.shape[2:]))
    if M < 2:
        raise ValueError(
            f"sub_batch_size={sub_batch_size} gives {M} value(s) to a sample variance for unit={unit!r} and x of shape "
            f"{tuple(x.shape)}; at least 2 are needed"
        )
    if of_loss and x.shape[0] < 2 * sub_batch_size:
        raise ValueError(
            f"x has {x.shape[0]} samples; a loss over two sub-batches of sub_batch_size={sub_batch_size} "
            f"needs at least {2 * sub_batch_size}"
        )
    least = 1 if num_sub_batches is None else num_sub_batches
    if x.shape[0] < least * sub_batch_size:
        raise ValueError(
            f"x has {x.shape[0]} samples; sub_batch_size={sub_batch_size} with num_sub_batches={least} "
            f"needs at least {least * sub_batch_size}"
        )
    K = x.shape[0] // sub_batch_size if num_sub_batches is None else num_sub_batches
    return SubBatches(sub_batch_size, K, per_activation)


def _beta_value(x: Metadata, beta: float | Metadata | None, form: str, per_activation: bool) -> float:
    """Check beta; return its value unless it is a tensor."""
    if beta is None:
        return DEFAULT_BETA[form]
    if form == "variance":
        got = f"a tensor of shape {tuple(beta.shape)}" if isinstance(beta, Metadata) else repr(beta)
        raise ValueError(f'form="variance" takes no beta; got {got}')
    if isinstance(beta, (int, float)) and not isinstance(beta, bool):
        return float(beta)
    if not isinstance(beta, Metadata):
        raise TypeError(f"beta must be a float or a Tensor; got {type(beta).__name__}")
    _check_layout("beta", beta.layout)
    units = unit_shape(x.shape, per_activation)
    if beta.shape and tuple(beta.shape) != units:
        unit = "activation" if per_activation else "channel"
        raise ValueError(
            f"beta must have shape () or {units}, one for each unit; got {tuple(beta.shape)} with unit={unit!r}"
        )
    if beta.device != x.device:
        raise ValueError(f"beta must be on x's device, {x.device}; got {beta.device}")
    wide = accumulation_dtype(x.dtype)
    if beta.dtype not in (wide, x.dtype):
        wanted = wide if wide == x.dtype else f"{wide} or {x.dtype}"
        raise TypeError(f"beta must be {wanted} for x of {x.dtype}; got {beta.dtype}")
    return 0.0

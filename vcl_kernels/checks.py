"""Every error a caller can make, found before any work: each names the argument, what came and what is wanted."""

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
    DEFAULT_BETA,
    FORMS,
    NO_MINIMUM,
    REDUCTIONS,
    UNITS,
    Activation,
    LossSpec,
    SubBatches,
    sub_batches,
)

_NAMED = tuple(name for name in ACTIVATIONS if name != "gelu_tanh")  # which is gelu with approximate="tanh"
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    """Raise TypeError unless ``value`` is a number; a tensor of one is not, for it may change."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):  # Real takes long to ask
        raise TypeError(f"{name} must be a float; got {value!r} ({type(value).__name__})")


def check_channel_dim(channel_dim: object) -> None:
    """Raise unless ``channel_dim`` is an integer, and not 0."""
    check_integer("channel_dim", channel_dim)
    if channel_dim == 0:
        raise ValueError("channel_dim must not be 0, the dimension of samples")


def channels_first(x: Tensor, channel_dim: int) -> Tensor:
    """Return ``x``, or a view of it, whose dimension 1 is what was ``channel_dim``: ``(N, L, C)`` as ``(N, C, L)``."""
    if channel_dim == 1:
        return x
    check_dimensions(x.shape)
    if not 1 - x.dim() <= channel_dim < x.dim():
        raise ValueError(f"channel_dim must be a dimension of x; got {channel_dim} for shape {tuple(x.shape)}")
    return x if channel_dim == 1 - x.dim() else x.movedim(channel_dim, 1)


def check_dimensions(shape: torch.Size) -> None:
    """Raise unless x of ``shape`` has as many dimensions as kernels know."""
    if not 2 <= len(shape) <= 8:
        raise ValueError(f"x must have 2 to 8 dimensions (N, C, *spatial); got shape {tuple(shape)}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless kernels know ``dtype``."""
    if dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {dtype}")


class Like(NamedTuple):
    """What a check sees of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor that has a shape and whose strides say where values lie."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor; got {type(value).__name__}")
    if type(value) in _SHAPELESS:
        raise TypeError(f"{name} must be a Tensor with a shape; got {type(value).__name__}")
    check_layout(name, torch.jagged if value.is_nested else value.layout)


def check_layout(name: str, layout: torch.layout) -> None:
    """Raise TypeError unless strides say where values lie."""
    if layout is not torch.strided:
        got = "a nested tensor" if layout is torch.jagged else f"one of layout {layout}"
        raise TypeError(f"{name} must be a dense Tensor, of layout torch.strided; got {got}")


_SHAPELESS = (UninitializedParameter, UninitializedBuffer)


def _described(name: str, value: Tensor) -> Like:
    if not isinstance(value, Tensor):
        check_tensor(name, value)
    try:
        return Like(value.shape, value.dtype, value.device, value.layout)
    except RuntimeError:  # it has no shape
        check_tensor(name, value)
        raise


def check_moments(x: Tensor, sub_batch_size: int, unit: str, num_sub_batches: int | None) -> SubBatches:
    """Check the arguments of ``sub_batch_moments``; return how x is cut."""
    return _sub_batches(_described("x", x), sub_batch_size, unit, num_sub_batches)


def _sub_batches(x: Like, sub_batch_size: int, unit: str, num_sub_batches: int | None) -> SubBatches:
    """Check what all functions share; K is the number asked for, or all."""
    check_layout("x", x.layout)
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
    least = 1 if num_sub_batches is None else num_sub_batches
    if x.shape[0] < least * sub_batch_size:
        raise ValueError(
            f"x has {x.shape[0]} samples; sub_batch_size={sub_batch_size} with num_sub_batches={least} "
            f"needs at least {least * sub_batch_size}"
        )
    K = x.shape[0] // sub_batch_size if num_sub_batches is None else num_sub_batches
    return SubBatches(sub_batch_size, K, per_activation)


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
    """Check the arguments of a loss; return beta as a tensor, if it is one, and everything else resolved."""
    described = _described("beta", beta) if isinstance(beta, Tensor) else beta
    arguments = (
        _described("x", x),
        described,
        sub_batch_size,
        form,
        unit,
        num_sub_batches,
        reduction,
        weight,
        beta_min,
    )
    spec = None
    if not torch.compiler.is_compiling():
        try:
            spec = _known_spec(*arguments)
        except TypeError:  # symbolic sizes cannot be looked up; nor a wrong argument, which the check itself names
            spec = None
    if spec is None:
        spec = _loss_spec(*arguments)
    if not isinstance(beta, Tensor):
        return None, spec
    return beta.float() if beta.dtype in (torch.bfloat16, torch.float16) else beta, spec


def _loss_spec(
    x: Like,
    beta: float | Like | None,
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
        if isinstance(value, Tensor):  # under a compiler a number may be a symbol
            check_number(name, value)
    if num_sub_batches is not None:
        check_count("num_sub_batches", num_sub_batches, 2)
    per_activation = _sub_batches(x, sub_batch_size, unit, num_sub_batches).per_activation
    if x.shape[0] < 2 * sub_batch_size:
        raise ValueError(
            f"x has {x.shape[0]} samples; a loss over two sub-batches of sub_batch_size={sub_batch_size} "
            f"needs at least {2 * sub_batch_size}"
        )
    K = sub_batches(form, x.shape[0], sub_batch_size, num_sub_batches)
    value = _check_beta(x, beta, form, per_activation)
    units = math.prod(unit_shape(x.shape, per_activation))
    factor = weight / units if reduction == "mean" and units else weight
    if reduction == "mean" and not units:
        factor = math.nan  # the mean of nothing, as torch.mean has it
    return LossSpec(value, beta_min, sub_batch_size, K, FORMS.index(form), per_activation, factor, reduction != "none")


_known_spec = lru_cache(1024, typed=True)(_loss_spec)  # a small loss takes less time than its checks


def check_activation(
    activation: str, alpha: float = 1.0, negative_slope: float = 0.01, approximate: str = "none"
) -> Activation:
    """Check the choice of an activation; return it as kernels are told it."""
    check_choice("activation", activation, _NAMED)
    check_choice("approximate", approximate, ("none", "tanh"))
    check_number("alpha", alpha)
    check_number("negative_slope", negative_slope)
    parameter = {"elu": alpha, "leaky_relu": negative_slope}.get(activation, 0.0)
    name = "gelu_tanh" if activation == "gelu" and approximate == "tanh" else activation
    return Activation(ACTIVATIONS.index(name), float(parameter))


def _check_beta(x: Like, beta: float | Like | None, form: str, per_activation: bool) -> float:
    """Check beta; return its value if it is not a tensor."""
    if beta is None:
        return DEFAULT_BETA[form]
    if form == "variance":
        raise ValueError(f'form="variance" takes no beta; got {_shown(beta)}')
    if isinstance(beta, (int, float)) and not isinstance(beta, bool):
        return float(beta)
    if not isinstance(beta, Like):
        raise TypeError(f"beta must be a float or a Tensor; got {type(beta).__name__}")
    check_layout("beta", beta.layout)
    units = unit_shape(x.shape, per_activation)
    if beta.shape and tuple(beta.shape) != units:
        raise ValueError(f"beta must have shape () or {units}, one for each unit; got {tuple(beta.shape)}")
    if beta.device != x.device:
        raise ValueError(f"beta must be on x's device, {x.device}; got {beta.device}")
    wide = accumulation_dtype(x.dtype)
    if beta.dtype not in (wide, x.dtype):
        wanted = wide if wide == x.dtype else f"{wide} or {x.dtype}"
        raise TypeError(f"beta must be {wanted} for x of {x.dtype}; got {beta.dtype}")
    return 0.0


def _shown(beta: object) -> str:
    return f"a tensor of shape {tuple(beta.shape)}" if isinstance(beta, Like) else repr(beta)

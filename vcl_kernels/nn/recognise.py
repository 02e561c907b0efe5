"""Which modules are activations: decided by what they compute on drawn numbers, not by their class."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_activation
from ..options import Activation
from ..reference import activate
from .modules import VCLActivation
from .trial import trial_copy

__all__ = ["Recognised", "UnknownError", "comparable", "is_activation", "matching", "recognise"]

Function = Callable[[Tensor], Tensor]

# What an attribute of a fused module may be: its function may change with it, so it is compared at each call
SETTINGS = (bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType, MethodType, partial)
OF_EVERY_MODULE = {*vars(nn.Module()), "inplace"}


class Recognised(NamedTuple):
    """An activation module."""

    fused: Activation | None  # the fused activation that computes the same, if one does
    in_place: bool  # whether it overwrites its input


class UnknownError(Exception):
    """A module takes none of the tensors that were tried."""


class _ShapeError(Exception):
    """A module returned something else than a tensor of its input's shape."""


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` is an activation module; one that takes no tensor that was tried is not known to be."""
    try:
        return recognise(module) is not None
    except UnknownError:
        return False


def recognise(module: nn.Module, like: Tensor | None = None) -> Recognised | None:
    """Return what ``module`` is as an activation, or None if it is none.

    An activation module has no children and no matrices. In evaluation it maps a tensor to one of the same shape, each
    value for itself (*elementwise*), the same at each call, not as an affine function, and with the derivative that
    autograd gives. So dropout, norms, scales, masks and quantisation are none. A copy of it is tried, on the CPU.

    Args:
        module: any module.
        like: an input of it, whose shape, dtype and device are tried where others do not fit.

    Raises:
        UnknownError: the module takes none of the tensors that were tried.
    """
    if isinstance(module, VCLActivation | torch.jit.ScriptModule) or not all(map(_is_vcl, module.children())):
        return None
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(is_lazy(t) or sum(size > 1 for size in t.shape) > 1 for t in tensors):
        return None
    channels = max([1, *(t.numel() for t in tensors)])
    shapes = [(4, channels if channels > 1 else 6, *[3] * dims) for dims in range(4 if channels < 1 << 16 else 0)]
    may_be_fused = not tensors and settings_of(module) is not None and _takes_one(module)
    changes_shape = False
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for copied, x in _trials(module, shapes, like):
            with suppress(UnknownError):
                try:
                    return _recognise(copied, x, may_be_fused)
                except _ShapeError:
                    changes_shape = True
                    if not tensors:  # else by broadcasting, perhaps: parameters (C, 1, 1) want images
                        break
    if changes_shape:
        return None
    raise UnknownError


def settings_of(module: nn.Module) -> tuple[tuple[str, Any], ...] | None:
    """Return the attributes of ``module`` that may say what it computes; None if one of them cannot be compared."""
    if "forward" in vars(module):
        return None
    own = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
    for value in own.values():
        of_another = isinstance(value, MethodType) and value.__self__ is not module
        if of_another or not (value is None or isinstance(value, SETTINGS)):
            return None
    return tuple((name, comparable(value)) for name, value in own.items())


def comparable(value: Any) -> Any:
    """Return what says whether two settings are equal. A compiler compares no partials and no bound methods."""
    if isinstance(value, MethodType):
        return value.__func__
    return (value.func, value.args, value.keywords) if isinstance(value, partial) else value


def matching(module: nn.Module) -> Activation | None:
    """Return the fused activation that ``module`` computes now, or None."""
    try:
        recognised = recognise(module)
    except UnknownError:
        return None
    return None if recognised is None else recognised.fused


def _takes_one(module: nn.Module) -> bool:
    """Whether the forward takes one argument: a fused module passes no others on."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())
    return len(parameters) == 2 and parameters[1].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD


def _is_vcl(child: nn.Module) -> bool:
    return isinstance(child, nn.ModuleList) and all(isinstance(vcl, VCLActivation) for vcl in child)


def _trials(
    module: nn.Module, shapes: list[tuple[int, ...]], like: Tensor | None
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield copies of ``module`` in evaluation, and a tensor to try."""
    copied = trial_copy(module, torch.float64)
    yield from ((copied, torch.empty(shape, dtype=torch.float64, device="cpu")) for shape in shapes)
    if like is not None and not like.is_meta and like.is_floating_point():
        yield trial_copy(module, None), like


def _recognise(copied: nn.Module, like: Tensor, may_be_fused: bool) -> Recognised | None:
    """Try tensors of the shape, dtype and device of one."""
    function: Function = copied.forward
    attributes = dict(vars(copied))
    generator = torch.Generator().manual_seed(0)
    size = torch.where(torch.rand(like.shape, generator=generator) < 0.25, 30, 4)  # some are clipped far from 0
    a, b = (sign * (torch.rand(like.shape, generator=generator) * size + 0.1).to(like) for sign in (1, -1))
    chosen = (torch.rand(like.shape, generator=generator) < 0.5).to(like.device)
    mixed = torch.where(chosen, a, b)
    with torch.no_grad():
        try:
            y = function(a.clone())
        except Exception as error:
            raise UnknownError from error
        if not isinstance(y, Tensor) or y.shape != a.shape or not y.is_floating_point():
            raise _ShapeError
        x = b.clone()
        try:
            of_b, of_mixed = function(x), function(mixed.clone())
            if not _is_elementwise(chosen, y, of_b, of_mixed) or _is_affine(function, a, b, y, of_b):
                return None
        except Exception:  # it does not take other values, or makes another shape of them
            return None
    if not _has_its_derivative(function, mixed):
        return None
    changed = vars(copied).keys() != attributes.keys() or any(vars(copied)[k] is not v for k, v in attributes.items())
    may_be_fused = may_be_fused and not changed and a.dtype == torch.float64  # fused, it would keep no notes
    fused = _fused_like(copied, a.shape) if may_be_fused else None
    return Recognised(fused, not torch.equal(x, b))


def _is_elementwise(chosen: Tensor, of_a: Tensor, of_b: Tensor, of_mixed: Tensor) -> bool:
    """Whether each value is finite, and stays when the inputs of others change from a's to b's."""
    return bool(of_mixed.isfinite().all()) and torch.equal(of_mixed, torch.where(chosen, of_a, of_b))


def _is_affine(function: Function, a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> bool:
    """Whether the function at the middle of a and b is the mean of those at both."""
    middle, mean = function((a + b) / 2), (of_a + of_b) / 2
    return bool(((middle - mean).abs() <= 4 * _precision(a) ** 0.75 * (1 + mean.abs())).all())


def _precision(x: Tensor) -> float:
    """Return the rounding error of x's dtype, or of float32, in which some modules compute whatever they get."""
    return max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)


def _has_its_derivative(function: Function, x: Tensor) -> bool:
    """Whether autograd gives the derivative of what is computed; a quantiser's is that of the identity, or 0."""
    h = max(torch.finfo(x.dtype).eps ** (1 / 3), 1e-4)  # float32's rounding over that is far below the tolerance
    try:
        dx = _derivative(function, x)
        flat = not dx.any() and not _derivative(function, x / 8).any()
    except RuntimeError:  # y has no graph
        return False
    with torch.no_grad():
        difference = (function(x + h) - function(x - h)) / (2 * h)
    close = (dx - difference).abs() <= 30 * h * (1 + difference.abs())
    return not flat and bool(close.double().mean() > 0.9)


def _derivative(function: Function, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x.clone()).sum(), x)[0]


def _fused_like(copied: nn.Module, shape: torch.Size) -> Activation | None:
    """Return the fused activation with the values and derivatives of ``copied`` in float64, in both modes."""
    far = 10.0 ** torch.arange(1, 7, dtype=torch.float64)
    values = torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64) + 1e-3, far, -far])
    rows = math.ceil(len(values) / math.prod(shape[1:]))
    x = values.repeat(2 + math.prod(shape[1:]) // len(values))[: rows * math.prod(shape[1:])].view(rows, *shape[1:])
    results = []
    for training in (False, True):
        copied.training = training
        with torch.no_grad():
            results.append((copied.forward(x.clone()), _derivative(copied.forward, x)))
    slope, alpha = (-float(copied.forward(torch.full_like(x, at)).flatten()[0]) for at in (-1.0, -40.0))
    for activation in (
        check_activation("relu"),
        check_activation("leaky_relu", negative_slope=slope),
        check_activation("elu", alpha=alpha),
        check_activation("gelu"),
        check_activation("gelu", approximate="tanh"),
        check_activation("silu"),
        check_activation("tanh"),
    ):
        same_values = all(_agree(y, activate(x, activation)) for y, _ in results)
        wanted = _derivative(partial(activate, activation=activation), x)
        if same_values and all(_agree(dx, wanted) for _, dx in results):
            return activation
    return None


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-10, atol=1e-10)

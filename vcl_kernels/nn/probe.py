"""The probe: an evaluation forward on an example. It shows each call of a module, and where its input has channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..torch_private import base_of, map_tensors, tensors_in
from .fused import first_input

__all__ = ["Call", "probe"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

_copy = partial(map_tensors, torch.clone)


class Call(NamedTuple):
    """One call of a module."""

    x: Tensor  # its first input
    channel_dim: int  # -1 where x has three or more dimensions, of which the last is features; else 1


def probe(model: nn.Module, modules: list[nn.Module], example: Any) -> dict[nn.Module, list[Call]]:
    """Run ``model`` on ``example`` (a tensor, or tuple or mapping of arguments); return every call of each module.

    Raises:
        ValueError: the output of ``model`` changes when ``modules`` run out of place, as they do in training with VCL.
    """
    calls: dict[nn.Module, list[Call]] = {}
    features_last = FeaturesLast()

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        last = x.dim() > 2 and (_acts_on_last_dim(module) or features_last.knows(x))
        calls.setdefault(module, []).append(Call(x, -1 if last else 1))

    with features_last:
        output = _evaluate(model, example, modules, record)
    in_place = [module for module in modules if getattr(module, "inplace", False)]
    differs = bool(in_place) and not _equal(output, _evaluate(model, example, in_place, _copy_inputs))
    if differs and _equal(output, _evaluate(model, example)):  # a random model differs from itself
        raise ValueError(
            f"model ({type(model).__name__}) does not compute the same with its activations out of place, as VCL runs "
            "them in training: something else reads what they overwrite. Let it read what they return"
        )
    return calls


def _evaluate(model: nn.Module, example: Any, hooked: list[nn.Module] | None = None, hook: Any = None) -> Any:
    """Return the evaluation output of ``model`` for a copy of ``example``, with ``hook`` before each of ``hooked``.

    Modes are set by attribute: a model may define ``eval()`` itself (an adapter merges its weights there).
    """
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in hooked or ()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if isinstance(example, Mapping):
                return model(**_copy(dict(example)))
            return model(*_copy(example)) if isinstance(example, tuple) else model(_copy(example))
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()


def _copy_inputs(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _copy(args), _copy(kwargs)


def _equal(output: Any, other: Any) -> bool:
    """Whether all tensors of two outputs are equal, NaN to NaN."""
    a, b = tensors_in(output), tensors_in(other)
    return len(a) == len(b) and all(
        s.shape == t.shape and bool(((s == t) | ((s != s) & (t != t))).all()) for s, t in zip(a, b, strict=True)
    )


class FeaturesLast(TorchFunctionMode):
    """While entered, notes which tensors have their features in the last dimension:

    - outputs of linear functions, and of norms over the last dimension;
    - what is computed from such a tensor without a change of shape (a sum, a dropout; not a convolution);
    - views of both that leave the features last, all of them or a part (a gate), but not those that cut the features
      into several dimensions (an image, heads).
    """

    def __init__(self) -> None:
        super().__init__()
        self._features = WeakTensorKeyDictionary()  # by tensor that is no view: stride and number of its features

    def knows(self, x: Tensor) -> bool:
        """Whether ``x`` has its features last."""
        whole = base_of(x)
        stride, number = self._features.get(whole, (None, 0))
        if stride is None or x.stride(-1) != stride:  # tensors with no strides are not known
            return False
        steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        # A view that cuts the features into several dimensions has another dimension whose steps lie among them.
        return x is whole or not any(stride <= step < stride * number for step in steps)

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note whether its output has features last."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        is_matrix = isinstance(out, Tensor) and out.dim() > 1
        if is_matrix and (_is_linear(func, args, kwargs) or self._keeps(func, out, args)):
            self._features[base_of(out)] = out.stride(-1), out.shape[-1]
        return out

    def _keeps(self, func: Callable[..., Any], out: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether ``out`` is computed from a known tensor of its shape."""
        if base_of(out) is not out or func in CONVOLUTIONS:
            return False
        return any(isinstance(x, Tensor) and x.shape == out.shape and self.knows(x) for x in args)


def _is_linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` is a linear function or a norm over the last dimension alone."""
    if func in (F.layer_norm, F.rms_norm):
        return len(args[1] if len(args) > 1 else kwargs["normalized_shape"]) == 1
    return func in (F.linear, torch.addmm)


def _acts_on_last_dim(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer or a norm over the last dimension alone."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):  # a subclass may permute images around its norm
        plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return plain and len(module.normalized_shape) == 1
    return isinstance(module, nn.Linear)

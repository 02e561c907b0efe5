"""Which tensors of a forward have their features in the last dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..torch_private import base_of

__all__ = ["FeaturesLast", "acts_on_last_dim"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


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


def acts_on_last_dim(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer or a norm over the last dimension alone."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):  # a subclass may permute images around its norm
        plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return plain and len(module.normalized_shape) == 1
    return isinstance(module, nn.Linear)

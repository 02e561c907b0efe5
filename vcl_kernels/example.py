"""What one evaluation forward of a model shows of the places where VCL belongs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Call", "calls_of"]


class Call(NamedTuple):
    """One call of a module in the example's forward."""

    x: Tensor  # what it was given
    channel_dim: int  # -1 where x, of three or more dimensions, has its features last; else 1


def calls_of(model: nn.Module, modules: list[nn.Module], example: Any) -> dict[nn.Module, list[Call]]:
    """Run ``model`` on ``example`` (a tensor, or tuple or dict of arguments); return every call of each module."""
    calls: dict[nn.Module, list[Call]] = {}
    features_last = FeaturesLast()

    def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named.values()))
        last = x.dim() > 2 and (_works_on_features(module) or features_last.knows(x))
        calls.setdefault(module, []).append(Call(x, -1 if last else 1))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), features_last:
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for module, mode in training:
            module.training = mode
        for hook in hooks:
            hook.remove()
    return calls


class FeaturesLast(TorchFunctionMode):
    """Learns which tensors have their features in the last dimension, while it is entered.

    They are what linear functions and norms over the last dimension return, what has the shape of such a tensor and is
    made from it (a sum, a dropout), and views of both that leave the dimension last (a gate).
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # with the stride of the features

    def knows(self, x: Tensor) -> bool:
        """Whether ``x`` is one of them."""
        whole = _whole(x)
        ref, stride = self._known.get(id(whole), (None, 0))
        return ref is not None and ref() is whole and x.stride(-1) == stride

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and look at what it returns."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dim() > 1 and (_is_linear(func, args, kwargs) or self._follows(out, args)):
            whole = _whole(out)
            self._known[id(whole)] = weakref.ref(whole), out.stride(-1)
        return out

    def _follows(self, out: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether ``out``, which is no view, has the shape of something known that it was made from."""
        made_from = [x for x in args if isinstance(x, Tensor) and x.shape == out.shape]
        return out._base is None and any(self.knows(x) for x in made_from)


def _is_linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` returns features in the last dimension: a linear function, or a norm over that one."""
    if func in (F.layer_norm, F.rms_norm):
        return len(args[1] if len(args) > 1 else kwargs["normalized_shape"]) == 1
    return func in (F.linear, torch.addmm)


def _whole(x: Tensor) -> Tensor:
    """Return the tensor that ``x`` is a view of, or ``x`` itself."""
    return x if x._base is None else x._base


def _works_on_features(module: nn.Module) -> bool:
    """Whether ``module`` takes its features in the last dimension, however many there are."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):  # a subclass may turn images around before and after
        plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return plain and len(module.normalized_shape) == 1
    return isinstance(module, nn.Linear)

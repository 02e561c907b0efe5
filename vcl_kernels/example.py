"""What one evaluation forward of a model shows of the places where VCL belongs."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Call", "calls_of"]


class Call(NamedTuple):
    """One call of a module in the example's forward."""

    x: Tensor  # what it was given
    channel_dim: int  # -1 where x, of three or more dimensions, has its features last; else 1


def calls_of(model: nn.Module, modules: list[nn.Module], example: Any) -> dict[nn.Module, list[Call]]:
    """Run ``model`` on ``example`` (a tensor, or tuple or dict of arguments); return every call of each module.

    Features are known to be last in what a linear layer, or a norm over the last dimension, takes or returns.
    """
    calls: dict[nn.Module, list[Call]] = {}
    returned: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...]]] = {}  # by features-last modules

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        whole = _whole(output)
        returned[id(whole)] = weakref.ref(whole), output.stride()

    def features_last(x: Tensor) -> bool:
        whole = _whole(x)
        ref, strides = returned.get(id(whole), (lambda: None, None))
        return ref() is whole and x.stride() == strides  # x is what was returned, or a part of it (a gate)

    def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named.values()))
        last = x.dim() > 2 and (_works_on_features(module) or features_last(x))
        calls.setdefault(module, []).append(Call(x, -1 if last else 1))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(note) for module in model.modules() if _works_on_features(module)]
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
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


def _whole(x: Tensor) -> Tensor:
    """Return the tensor that ``x`` is a view of, or ``x`` itself."""
    return x if x._base is None else x._base


def _works_on_features(module: nn.Module) -> bool:
    """Whether ``module`` takes and returns its features in the last dimension, however many there are."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):  # a subclass may turn images around before and after
        plain = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return plain and len(module.normalized_shape) == 1
    return isinstance(module, nn.Linear)

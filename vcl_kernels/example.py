"""What one evaluation forward of a model shows of the places where VCL belongs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Call", "calls_of"]

CHANNELS_LAST = (nn.Linear, nn.LayerNorm)  # what they return has its features in the last dimension, however many


class Call(NamedTuple):
    """One call of a module in the example's forward."""

    x: Tensor  # what it was given
    channel_dim: int  # -1 where that very tensor came from one of CHANNELS_LAST with more than two dimensions, else 1


def calls_of(model: nn.Module, modules: list[nn.Module], example: Any) -> dict[nn.Module, list[Call]]:
    """Run ``model`` on ``example`` (a tensor, or tuple or dict of arguments); return every call of each module."""
    calls: dict[nn.Module, list[Call]] = {}
    channels_last: dict[int, Tensor] = {}  # by id; the tensor is kept, so that no other gets its id

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        channels_last[id(output)] = output

    def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named.values()))
        calls.setdefault(module, []).append(Call(x, -1 if id(x) in channels_last and x.dim() > 2 else 1))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(note) for module in model.modules() if isinstance(module, CHANNELS_LAST)]
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

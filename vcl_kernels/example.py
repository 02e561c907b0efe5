"""What one evaluation forward of a model shows of the places where VCL belongs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Call", "calls_of"]


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Call(NamedTuple):
    """One call of a module in the example's forward."""

    x: Tensor  # what it was given
    channel_dim: int  # -1 where x, of three or more dimensions, has its features last; else 1


def calls_of(model: nn.Module, modules: list[nn.Module], example: Any) -> dict[nn.Module, list[Call]]:
    """Run ``model`` on ``example`` (a tensor, or tuple or mapping of arguments); return every call of each module.

    Raises:
        ValueError: ``model`` computes something else with ``modules`` out of place, as VCL runs them in training.
    """
    calls: dict[nn.Module, list[Call]] = {}
    features_last = FeaturesLast()

    def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named.values()))
        last = x.dim() > 2 and (_works_on_features(module) or features_last.knows(x))
        calls.setdefault(module, []).append(Call(x, -1 if last else 1))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        with features_last:
            output = _evaluated(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    in_place = [module for module in modules if getattr(module, "inplace", False)]
    differs = bool(in_place) and not _same(output, _out_of_place(model, in_place, example))
    if differs and _same(output, _evaluated(model, example)):  # and not by chance, as of a model that draws numbers
        raise ValueError(
            f"model ({type(model).__name__}) does not compute the same with its activations out of place, as VCL runs "
            "them in training: something else reads what they overwrite. Let it read what they return"
        )
    return calls


def _evaluated(model: nn.Module, example: Any) -> Any:
    """Return what ``model`` makes of ``example`` in evaluation, without a trace in either.

    Without ``model.eval()`` too, which a model may have its own of (an adapter merges its weights there).
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in training:
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if isinstance(example, Mapping):
                return model(**_copy(dict(example)))
            return model(*_copy(example)) if isinstance(example, tuple) else model(_copy(example))
    finally:
        for module, mode in training:
            module.training = mode


def _out_of_place(model: nn.Module, in_place: list[nn.Module], example: Any) -> Any:
    """Return the same where what enters ``in_place`` is a copy."""

    def copied(
        module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _copy(args), _copy(named)

    hooks = [module.register_forward_pre_hook(copied, with_kwargs=True) for module in in_place]
    try:
        return _evaluated(model, example)
    finally:
        for hook in hooks:
            hook.remove()


def _copy(values: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, values)


def _same(output: Any, other: Any) -> bool:
    a, b = ([leaf for leaf in tree_leaves(o) if isinstance(leaf, Tensor)] for o in (output, other))
    return len(a) == len(b) and all(map(_equal, a, b))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the two are equal, NaN being NaN's equal."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


class FeaturesLast(TorchFunctionMode):
    """Learns which tensors have their features in the last dimension, while it is entered.

    They are what linear functions and norms over the last dimension return, what has the shape of such a tensor and is
    made from it (a sum, a dropout; not a convolution), and views of both that leave the features last: some of them (a
    gate) or all, not those that cut them up (into an image, into heads).
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # with the features' stride and number

    def knows(self, x: Tensor) -> bool:
        """Whether ``x`` is one of them."""
        whole = _whole(x)
        ref, stride, features = self._known.get(id(whole), (None, 0, 0))
        if ref is None or ref() is not whole or x.stride(-1) != stride:
            return False
        apart = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        return x is whole or all(not stride <= step < stride * features for step in apart)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and look at what it returns."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (
            isinstance(out, Tensor)
            and out.dim() > 1
            and (_is_linear(func, args, kwargs) or self._follows(func, out, args))
        ):
            whole = _whole(out)
            self._known[id(whole)] = weakref.ref(whole), out.stride(-1), out.shape[-1]
        return out

    def _follows(self, func: Callable[..., Any], out: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether ``out``, which is no view, has the shape of something known that it was made from."""
        if out._base is not None or func in CONVOLUTIONS:
            return False
        return any(isinstance(x, Tensor) and x.shape == out.shape and self.knows(x) for x in args)


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

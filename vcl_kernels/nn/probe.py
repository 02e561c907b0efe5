"""The probe: an evaluation forward on an example, which shows every call of a module and of an activation function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..torch_private import tensors_in, version_of
from .beta import Fit
from .example import copied, evaluate
from .features import FeaturesLast, acts_on_last_dim
from .functions import FunctionCall, FunctionCalls
from .fused import first_input

__all__ = ["Call", "Probed", "probe", "why_not"]


class Call(NamedTuple):
    """One call of a module, and the tensor there that VCL is for."""

    x: Any  # the first input, or the output
    channel_dim: int  # -1 where x has three or more dimensions, of which the last is features; else 1
    inputs: int  # how many arguments the call has
    time_first: bool  # inside a module that says batch_first=False
    beta: float | None = None  # at which the ratio asks for the variance of x; None: nobody asked


class Probed(NamedTuple):
    """What the forward showed."""

    calls: dict[nn.Module, list[Call]]
    strangers: dict[nn.Module, FunctionCall]  # modules that are called and are not in the model
    functions: list[FunctionCall]
    rows: set[int]  # of the example's tensors, in dimension 0


def probe(
    model: nn.Module,
    before: list[nn.Module],
    behind: list[nn.Module],
    in_place: list[nn.Module],
    example: Any,
    fit: Fit | None = None,
) -> Probed:
    """Run ``model`` on ``example`` (a tensor, or tuple or mapping of arguments); return what it shows.

    Args:
        model: any module.
        before: modules whose inputs are wanted.
        behind: modules whose outputs are wanted.
        in_place: those that overwrite their input.
        example: copied, so that nothing of it changes.
        fit: returns the beta for a module, the tensor there that VCL is for, and where its channels are.

    Raises:
        ValueError: the output of ``model`` changes when modules run out of place, as they do in training with VCL, or
            what a layer of ``behind`` returned is overwritten.
    """
    calls: dict[nn.Module, list[Call]] = {}
    strangers: dict[nn.Module, FunctionCall] = {}
    outputs: list[tuple[nn.Module, Tensor, int]] = []
    running: list[nn.Module] = []
    features, functions = FeaturesLast(), FunctionCalls(running)
    known = set(model.modules())

    def keep(module: nn.Module, x: Any, inputs: int) -> None:
        last = isinstance(x, Tensor) and x.dim() > 2 and (acts_on_last_dim(module) or features.knows(x))
        time_first = any(getattr(_attention_of(outer), "batch_first", None) is False for outer in running)
        dim = -1 if last else 1
        beta = None if fit is None or why_not(x) is not None else fit(module, x, dim)  # now: x may be overwritten
        calls.setdefault(module, []).append(Call(x, dim, inputs, time_first, beta))

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module not in known:
            strangers[module] = functions.call(type(module).__name__, next(iter(args), None))
        running.append(module)

    def leave(module: nn.Module, _args: Any, y: Any) -> None:
        running.pop()
        functions.returned(module, y)

    def before_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args or kwargs:  # a table of biases takes nothing
            keep(module, first_input(args, kwargs), len(args) + len(kwargs))

    def behind_hook(module: nn.Module, _args: tuple[Any, ...], y: Any) -> None:
        keep(module, y, 1)
        if isinstance(y, Tensor):
            outputs.append((module, y, version_of(y)))

    hooks = [module.register_forward_pre_hook(before_hook, with_kwargs=True) for module in before]
    hooks += [module.register_forward_hook(behind_hook) for module in behind]
    hooks += [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    with features, functions, _removing(hooks):
        output = evaluate(model, example)
    names = {module: name for name, module in model.named_modules()}
    for module, y, version in outputs:
        if version_of(y) != version:
            raise ValueError(
                f"after names {names[module]!r}, and a later in-place function or module overwrites its output, which "
                "VCL's gradient needs. Use inplace=False there"
            )
    _check_out_of_place(model, example, in_place, output)
    arguments = list(
        example.values() if isinstance(example, Mapping) else example if isinstance(example, tuple) else [example]
    )
    rows = {tensor.shape[0] for tensor in tensors_in(arguments) if tensor.dim()}
    rows |= {
        len(images) for images in arguments if isinstance(images, (list, tuple)) and images
    }  # detectors take a list
    return Probed(calls, strangers, functions.found, rows)


def why_not(x: Any) -> str | None:
    """Return what ``x`` is where it cannot have VCL; None if it can."""
    if not isinstance(x, Tensor):
        return f"{type(x).__name__} where a tensor is wanted"
    if not x.is_floating_point():
        return f"values of {x.dtype}"
    return f"a {x.dim()}-D tensor where (N, C, …) is wanted" if x.dim() < 2 else None


def _attention_of(module: nn.Module) -> nn.Module:
    """Return what says where ``module`` has its batch: a transformer's layer leaves that to its attention."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return module.get_submodule("self_attn")
    return module


def _check_out_of_place(model: nn.Module, example: Any, in_place: list[nn.Module], output: Any) -> None:
    hooks = [module.register_forward_pre_hook(_copy_inputs, with_kwargs=True) for module in in_place]
    with _removing(hooks):
        differs = bool(in_place) and not _equal(output, evaluate(model, example))
    if differs and _equal(output, evaluate(model, example)):  # a random model differs from itself
        raise ValueError(
            f"the output of model ({type(model).__name__}) changes when its activations run with inplace=False, as VCL "
            "needs in training: something else reads the tensor that they overwrite. Let it read what they return"
        )


@contextmanager
def _removing(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _copy_inputs(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return copied(args), copied(kwargs)


def _equal(output: Any, other: Any) -> bool:
    """Whether all tensors of two outputs are equal, NaN to NaN. Those on meta have no values."""
    a, b = tensors_in(output), tensors_in(other)
    return len(a) == len(b) and all(
        s.shape == t.shape and (s.is_meta or bool(((s == t) | ((s != s) & (t != t))).all()))
        for s, t in zip(a, b, strict=True)
    )

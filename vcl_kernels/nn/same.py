"""Whether a model computes the same after a change, tried on a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_private import map_tensors, tensors_in
from .example import evaluate
from .flow import same_random_numbers
from .trial import model_copy

__all__ = ["check_same"]

TOLERANCE = 1e-6  # of the largest value, in float64


def check_same(
    model: nn.Module, example: Any, change: Callable[[dict[nn.Module, nn.Module]], None], changed: str
) -> None:
    """Raise ValueError if the evaluation output of ``model`` on ``example`` is another after ``change``.

    Both run in float64. A model that does not run so is compared in its own precision, to the square root of that.

    Args:
        model: any module, which stays as it is.
        example: a tensor, or tuple or mapping of arguments.
        change: carries the change out on a copy. It gets the copy's modules by those of the model.
        changed: what was changed, for the message.
    """
    described = f"of model ({type(model).__name__}) on example_input"
    copied, arguments = _copy(model), example
    try:
        copied.double()
        arguments = map_tensors(_double, example)
        before = _outputs(copied, arguments)
    except Exception:  # it runs the user's code
        copied, arguments = _copy(model), example
        before = _outputs(copied, arguments)
    if _difference(before, _outputs(copied, arguments)) > _tolerance(before):
        raise ValueError(
            f"the output {described} differs from one call to the next, so that it cannot be compared. Leave "
            "example_input out, or make the forward deterministic. The model is unchanged"
        )
    try:
        change(dict(zip(model.modules(), copied.modules(), strict=True)))
        after = _outputs(copied, arguments)
    except Exception as error:
        raise ValueError(
            f"the forward {described} raises {type(error).__name__} ({error}) after {changed}, on a copy. Something in "
            "it depends on them in another way than by calls. The model is unchanged"
        ) from error
    difference = _difference(before, after)
    if difference > _tolerance(before):
        raise ValueError(
            f"the output {described} moves by {difference:.2g} of its largest value after {changed}, on a copy. "
            "Something in the forward depends on them in another way than by calls. The model is unchanged"
        )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return model_copy(model, shares_parameters=False)
    except Exception as error:
        raise ValueError(
            f"model ({type(model).__name__}) cannot be copied ({type(error).__name__}: {error}), and example_input is "
            "tried on a copy. Leave it out"
        ) from error


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with same_random_numbers(model):
        return [t for t in tensors_in(evaluate(model, example)) if not t.is_meta]


def _tolerance(outputs: list[Tensor]) -> float:
    precisions = [torch.finfo(t.dtype).eps for t in outputs if t.is_floating_point()]
    return max(TOLERANCE, max(precisions, default=0) ** 0.5)


def _difference(outputs: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest difference, as a part of the largest value of its tensor. Whole numbers count if alone."""
    if [t.shape for t in outputs] != [t.shape for t in others]:
        return float("inf")
    pairs = list(zip(outputs, others, strict=True))
    floating = [(a, b) for a, b in pairs if a.is_floating_point() or a.is_complex()]
    if not floating:
        return 0.0 if all(torch.equal(a, b) for a, b in pairs) else float("inf")
    return max(_relative(a, b) for a, b in floating)


def _relative(a: Tensor, b: Tensor) -> float:
    alike = (a == b) | (a.isnan() & b.isnan())
    if bool(alike.all()):
        return 0.0
    difference = float((a - b)[~alike].abs().max())
    finite = a[a.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    relative = difference / largest if largest else float("inf")
    return relative if relative == relative else float("inf")  # NaN: one of the two is not finite

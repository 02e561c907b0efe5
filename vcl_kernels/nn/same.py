"""Whether a model computes the same after a change, tried on copies."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..torch_private import map_tensors, tensors_in
from .example import run
from .flow import same_random_numbers
from .trial import model_copy

__all__ = ["check_same"]

TOLERANCE = 1e-6  # of the largest value, in float64
Change = Callable[[dict[nn.Module, nn.Module]], None]


def check_same(model: nn.Module, example: Any, frozen: Collection[nn.Module], change: Change, changed: str) -> None:
    """Raise ValueError if an output of ``model`` on ``example`` is another after ``change``.

    Both modes are compared, training as far as the model runs in it. They run in float64; a model that does not is
    compared in its own precision, to the square root of that.

    Args:
        model: any module, which stays as it is.
        example: a tensor, or tuple or mapping of arguments.
        frozen: modules that are in evaluation in both modes.
        change: carries the change out on a copy. It gets the copy's modules by those of the model.
        changed: what was changed, for the message.
    """
    trial = _Trial(model, example, frozen, torch.float64)
    try:
        trial.outputs(training=False)
    except Exception:  # it runs the user's code
        trial = trial._replace(dtype=None)
    before, again = trial.outputs(training=False), trial.outputs(training=False)
    if _difference(before, again) > _tolerance(before):
        raise ValueError(
            f"the output of model ({type(model).__name__}) on example_input differs from one call to the next, so "
            "that it cannot be compared. Leave example_input out, or make the forward deterministic. The model is "
            "unchanged"
        )
    _check_mode(trial, False, before, change, changed)
    try:
        before, again = trial.outputs(training=True), trial.outputs(training=True)
    except Exception:  # it wants targets, for instance
        return
    if _difference(before, again) <= _tolerance(before):
        _check_mode(trial, True, before, change, changed)


def _check_mode(trial: _Trial, training: bool, before: list[Tensor], change: Change, changed: str) -> None:
    model = f"model ({type(trial.model).__name__}) on example_input"
    when = f"in {'training' if training else 'evaluation'} after {changed} in a copy"
    why = "Something in it depends on them in another way than by calls. The model is unchanged"
    try:
        after = trial.outputs(training, change)
    except Exception as error:
        raise ValueError(f"the forward of {model} raises {type(error).__name__} ({error}) {when}. {why}") from error
    difference = _difference(before, after)
    if difference > _tolerance(before):
        raise ValueError(f"the output of {model} moves by {difference:.2g} of its largest value {when}. {why}")


class _Trial(NamedTuple):
    """A model to copy, and how copies run."""

    model: nn.Module
    example: Any
    frozen: Collection[nn.Module]
    dtype: torch.dtype | None  # of floating-point tensors; None: their own

    def outputs(self, training: bool, change: Change | None = None) -> list[Tensor]:
        """Return the tensors in the output of a new copy: forwards may change one."""
        copied, example = self._copy(), self.example
        twins = dict(zip(self.model.modules(), copied.modules(), strict=True))
        for own, twin in twins.items():
            twin.training = training and own not in self.frozen
        if self.dtype is not None:
            copied.to(self.dtype)
            example = map_tensors(self._cast, example)
        if change is not None:
            change(twins)
        with same_random_numbers(copied):
            return [t for t in tensors_in(run(copied, example)) if not t.is_meta]

    def _copy(self) -> nn.Module:
        try:
            return model_copy(self.model, shares_parameters=False)
        except Exception as error:
            raise ValueError(
                f"model ({type(self.model).__name__}) cannot be copied ({type(error).__name__}: {error}), and "
                "example_input is tried on copies. Leave it out"
            ) from error

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t


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

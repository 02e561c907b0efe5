"""Whether a model computes the same after a change, tried on copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..torch_private import map_tensors, tensors_in, watching_ops
from .example import run
from .parts import (
    OTHER_DEPENDENCY,
    Change,
    OriginalCalledError,
    Parts,
    Redirect,
    Twins,
    copy_of,
    error_text,
    same_random_numbers,
)

__all__ = ["check_outputs"]

LEAST_TOLERANCE = 1e-6  # of the largest value of an output, in float64


def check_outputs(parts: Parts, example: Any, change: Change, changed: str) -> str | None:
    """Raise ValueError if an output of a model on ``example`` is another after ``change``.

    Both modes are compared, training as far as the model runs in it, with its batch norms in evaluation. They run in
    float64; a model that does not is compared in its own precision, to the square root of that.

    Args:
        parts: those of the model, which stays as it is.
        example: a tensor, or tuple or mapping of arguments.
        change: carries the change out on a copy.
        changed: what was changed, for the message.

    Returns:
        Why outputs could not be compared, or None.
    """
    try:
        compared = _check(parts, example, change, changed)
    except OriginalCalledError as error:
        return f"Outputs were not compared: {error}"
    return None if compared else "Outputs were not compared: the output on example_input holds no tensors"


def _check(parts: Parts, example: Any, change: Change, changed: str) -> bool:
    trial = _Trial(parts, example, torch.float64)
    try:
        before = trial.outputs(training=False)
    except Exception:  # it runs the user's code
        trial = trial._replace(dtype=None)
        before = trial.outputs(training=False)
    if _difference(before, trial.outputs(training=False)):
        raise ValueError(
            f"the output of model ({type(parts.model).__name__}) on example_input differs from one call to the next, "
            "and cannot be compared. Leave example_input out, or make the forward deterministic. The model is unchanged"
        )
    _check_mode(trial, False, before, change, changed)
    in_training = _repeated_in_training(trial)
    if in_training is not None:
        _check_mode(trial, True, in_training, change, changed)
    return bool(before.tensors)


def _repeated_in_training(trial: _Trial) -> Outputs | None:
    """Return the outputs in training if there are any, and the same ones each time."""
    try:
        outputs, again = trial.outputs(training=True), trial.outputs(training=True)
    except Exception:  # it wants targets, for instance
        return None
    return None if _difference(outputs, again) else outputs


def _check_mode(trial: _Trial, training: bool, before: Outputs, change: Change, changed: str) -> None:
    model = f"model ({type(trial.parts.model).__name__}) on example_input"
    when = f"in {'training' if training else 'evaluation'} after {changed} in a copy"
    try:
        after = trial.outputs(training, change)
    except OriginalCalledError:
        raise
    except Exception as error:
        raise ValueError(f"the forward of {model} raises {error_text(error)}, {when}. {OTHER_DEPENDENCY}") from error
    difference = _difference(before, after)
    if difference:
        raise ValueError(
            f"the output of {model} moves by {difference:.2g} of its largest value {when}. {OTHER_DEPENDENCY}"
        )


class Outputs(NamedTuple):
    """What a forward returned, and the least precise of the floating-point types in it."""

    tensors: list[Tensor]
    eps: float


class _Trial(NamedTuple):
    """A model to copy, and how copies run."""

    parts: Parts
    example: Any
    dtype: torch.dtype | None  # of floating-point tensors; None: their own

    def outputs(self, training: bool, change: Change | None = None) -> Outputs:
        """Return the tensors in the output of a new copy: forwards may change one."""
        copied, twins = self._copy(training)
        example, eps = self.example, [torch.finfo(torch.float64).eps]
        if self.dtype is not None:
            copied.to(self.dtype)
            example = map_tensors(self._cast, example)
        if change is not None:
            change(twins)
        with same_random_numbers(copied), Redirect(self.parts, twins):
            if self.dtype is None:  # a forward may compute less precisely than its output tells
                with watching_ops(lambda tensors: eps.extend(_eps(t) for t in tensors)):
                    output = run(copied, example)
            else:
                output = run(copied, example)
        return Outputs([t.detach() for t in _tensors_of(output) if not t.is_meta], max(eps))

    def _copy(self, training: bool) -> tuple[nn.Module, Twins]:
        try:
            return copy_of(self.parts, training)
        except ValueError as error:
            raise ValueError(f"{error}, and example_input is tried on copies. Leave it out") from error

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t


def _tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in containers, and in the attributes of an object."""
    return tensors_in(output) or (tensors_in(dict(vars(output))) if hasattr(output, "__dict__") else [])


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _difference(outputs: Outputs, others: Outputs) -> float:
    """Return the largest difference, as a part of the largest value of its tensor; 0 if it is none but by rounding.

    Tensors of whole numbers are compared where there are no others: rounding may change an index.
    """
    a, b = outputs.tensors, others.tensors
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    pairs = [(s, t) for s, t in zip(a, b, strict=True) if s.is_floating_point() or s.is_complex()]
    if not pairs:
        return 0.0 if all(torch.equal(s, t) for s, t in zip(a, b, strict=True)) else float("inf")
    tolerance, largest = max(LEAST_TOLERANCE, outputs.eps**0.5), max(_largest(s) for s, _ in pairs)
    differences = [(_largest_difference(s, t), _largest(s)) for s, t in pairs]
    noise = largest * outputs.eps**0.75  # what is left where large values cancel
    return max(
        (d / own if own else float("inf") for d, own in differences if d > max(tolerance * own, noise)), default=0.0
    )


def _largest(t: Tensor) -> float:
    finite = t[t.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; infinity where one of the two is not finite and the other is something else."""
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    differences = (a - b)[differ].abs()
    return float(differences.nan_to_num(nan=float("inf")).max()) if differences.numel() else 0.0

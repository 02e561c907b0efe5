"""The weight of VCL as a function of the step."""

from __future__ import annotations

import math
from typing import Literal

from ..checks import check_choice, check_count, check_number

__all__ = ["DECAYS", "Decay", "check_schedule", "weight_at"]

Decay = Literal["constant", "linear", "cosine"]
DECAYS = ("constant", "linear", "cosine")


def check_schedule(weight: float, warmup_steps: int, decay: str) -> None:
    """Raise ValueError or TypeError if one of them is wrong."""
    check_number("weight", weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be at least 0, and finite; got {weight}")
    check_count("warmup_steps", warmup_steps, 0)
    check_choice("decay", decay, DECAYS)


def weight_at(
    step: int,
    weight: float = 0.01,
    *,
    warmup_steps: int = 0,
    decay: Decay = "constant",
    total_steps: float | None = None,
) -> float:
    r"""Return the weight of VCL at an optimizer's step: a linear warm-up, then constant, or a decay to 0.

    With W warm-up steps of T in all: ``weight · step / W`` for ``step < W``, then ``weight`` times 1 (constant),
    ``1 - p`` (linear) or ``(1 + cos(π p)) / 2`` (cosine), with ``p = (step - W) / (T - W)``, at most 1.

    Args:
        step: optimizer steps before this one.
        weight: after the warm-up.
        warmup_steps: W.
        decay: ``"constant"``, ``"linear"`` or ``"cosine"``.
        total_steps: T, for a decay.

    Raises:
        ValueError, TypeError: an unknown decay, a decay without a finite ``total_steps``, a negative number.

    >>> [round(weight_at(step, 0.01, warmup_steps=2, decay="cosine", total_steps=6), 4) for step in range(7)]
    [0.0, 0.005, 0.01, 0.0085, 0.005, 0.0015, 0.0]
    """
    check_count("step", step, 0)
    check_schedule(weight, warmup_steps, decay)
    if decay != "constant" and (total_steps is None or not 1 <= total_steps < math.inf):
        raise ValueError(f"decay={decay!r} wants total_steps, the number of steps of the training; got {total_steps}")
    if step < warmup_steps:
        return weight * step / warmup_steps
    if decay == "constant":
        return weight
    assert total_steps is not None
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return weight * (1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2)

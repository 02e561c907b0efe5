"""What each op launches: the calls of the Triton backend that training makes, and a record of their launches.

Recording works on meta tensors too, so that launches can be compiled ahead of time without a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from vcl_kernels import saving
from vcl_kernels.backends.interface import Coefficients, Saved
from vcl_kernels.backends.triton import ops
from vcl_kernels.backends.triton.launch import Launch
from vcl_kernels.geometry import accumulation_dtype, empty_rows, empty_units
from vcl_kernels.options import ACTIVATIONS, FORMS, NO_MINIMUM, Activation, LossSpec, number_of_sub_batches

Job = Callable[[], Any]
SUB_BATCH_SIZE = {"ratio": 5, "variance": 8, "relative_variance": 8}


class Recorded(NamedTuple):
    """A launch and the arguments that it was given."""

    launch: Launch
    tensors: Any  # a NamedTuple of tensors and None
    scalars: tuple[float, ...]


def recorded(job: Job) -> list[Recorded]:
    """Call ``job`` with nothing launched; return what it would have launched, in order."""
    found = []

    def record(launch: Launch, tensors: Any, *scalars: float) -> None:
        found.append(Recorded(launch, tensors, scalars))

    with mock.patch.object(Launch, "__call__", record):
        job()
    return found


def spec_of(x: Tensor, form: str, unit: str = "channel", n: int | None = None) -> LossSpec:
    """The loss as a user gets it by default, of sub-batches of 5 for "ratio" and of 8 for the others."""
    n = n or SUB_BATCH_SIZE[form]
    K = number_of_sub_batches(form, x.shape[0], n, None)
    units = math.prod(x.shape[1:]) if unit == "activation" else x.shape[1]
    return LossSpec(1.0, NO_MINIMUM, n, K, FORMS.index(form), unit == "activation", 1 / units, True)


def beta_of(x: Tensor, spec: LossSpec) -> Tensor | None:
    """A learned beta as the form takes it: one for each unit of "ratio", one value for "relative_variance"."""
    one = {"ratio": empty_units(x, spec.per_activation), "relative_variance": x.new_empty(())}.get(spec.form_name)
    return None if one is None else one.to(accumulation_dtype(x.dtype)).fill_(0.5)


def loss_jobs(x: Tensor, spec: LossSpec) -> dict[str, Job]:
    """What vcl_loss calls, by what it is called for."""
    beta, g = beta_of(x, spec), x.new_full((), 0.5, dtype=accumulation_dtype(x.dtype))
    saves_rows = saving.for_loss(x, spec, ops) == "rows"
    saved = x[: spec.K * spec.n] if saves_rows else x
    with_grad = beta is not None
    coefficients = Coefficients(*(empty_units(x, spec.per_activation, spec.K).fill_(0.5) for _ in range(2)))
    jobs: dict[str, Job] = {"loss": lambda: ops.loss(x, beta, spec)}
    if saved is x and ops.takes_one_pass(x, spec):
        dx = empty_rows(x, x.shape[0])

        def multiplied() -> Tensor:
            ops.multiply_(dx.fill_(2.0), g)
            return dx

        jobs["loss and dx"] = lambda: ops.loss_dx(x, beta, spec, with_grad)
        jobs["dx times g"] = multiplied
    else:
        jobs["loss, to be differentiated"] = lambda: ops.loss_coefficients(x, beta, spec, with_grad, saves_rows)
        jobs["dx of loss"] = lambda: ops.moments_dx(saved, coefficients, g, spec.sub_batches, x.shape[0])
    return jobs


def moments_jobs(x: Tensor, spec: LossSpec) -> dict[str, Job]:
    """What sub_batch_moments calls."""
    coefficients = Coefficients(*(empty_units(x, spec.per_activation, spec.K).fill_(0.5) for _ in range(3)))
    return {
        "moments": lambda: ops.moments(x, spec.sub_batches),
        "dx of moments": lambda: ops.moments_dx(x, coefficients, None, spec.sub_batches, x.shape[0]),
    }


def activation_jobs(x: Tensor, spec: LossSpec, name: str) -> dict[str, Job]:
    """What vcl_activation calls: forward, and backward with the upstream gradients of both, of y, of the loss."""
    chosen = Activation(ACTIVATIONS.index(name), 1.0)
    beta, g = beta_of(x, spec), x.new_full((), 0.5, dtype=accumulation_dtype(x.dtype))
    saves_output = saving.output_and_rows(x, spec, chosen)
    rows = x[: spec.K * spec.n] if saves_output else None
    dy = torch.full_like(x, 0.5)
    coefficients = Coefficients(*(empty_units(x, spec.per_activation, spec.K).fill_(0.5) for _ in range(2)))

    def backward(dy: Tensor | None, g: Tensor | None) -> Tensor:
        saved = Saved(x, rows, saves_output)
        return ops.activation_dx(saved, dy, coefficients, g, chosen, spec.sub_batches, x.shape[0])

    return {
        name: lambda: ops.activation(x, beta, spec, chosen, beta is not None, saves_output),
        f"dx of {name} and loss": lambda: backward(dy, g),
        f"dx of {name}": lambda: backward(dy, None),
        f"dx of {name}'s loss": lambda: backward(None, g),
    }

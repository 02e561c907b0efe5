"""What a caller asked for, resolved once: the values that every backend is given beside the tensors."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

Form = Literal["ratio", "variance", "relative_variance"]
Unit = Literal["channel", "activation"]
Reduction = Literal["mean", "sum", "none"]
ActivationName = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "identity"]
Approximate = Literal["none", "tanh"]
BackendName = Literal["cpu", "triton", "reference"]
BetaMode = Literal["learned", "fixed", "running"]

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
FORMS: tuple[Form, ...] = get_args(Form)
UNITS: tuple[Unit, ...] = get_args(Unit)
BETA_MODES: tuple[BetaMode, ...] = get_args(BetaMode)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

DEFAULT_BETA = {"ratio": 1.0, "variance": 0.0, "relative_variance": 1e-5}
BETA_MOMENTUM = 0.1  # of a running beta, as of batch norm's running variance


def _named(argument: str, names: tuple[str, ...], index: int) -> str:
    """Return a choice's name. The ops take its number from whoever calls them."""
    if not 0 <= index < len(names):
        raise ValueError(f"{argument} must be from 0 to {len(names) - 1}, got {index}")
    return names[index]


class SubBatches(NamedTuple):
    """How the rows of x are cut, and what is a unit, in the order of the registered ops' arguments."""

    n: int  # samples in a sub-batch
    K: int  # sub-batches that take part
    per_activation: bool


class LossSpec(NamedTuple):
    """The loss apart from its tensors, in the order of the registered ops' arguments."""

    beta_value: float  # used where beta is not a tensor
    beta_min: float  # beta acts as max(beta, beta_min)
    n: int  # samples in a sub-batch
    K: int  # sub-batches that take part
    form: int  # index into FORMS
    per_activation: bool
    factor: float  # multiplies the loss and its gradients: weight, and 1 / U for reduction="mean"
    reduce: bool  # one value, not one for each unit

    @property
    def form_name(self) -> str:
        """Name in FORMS."""
        return _named("form", FORMS, self.form)

    @property
    def sub_batches(self) -> SubBatches:
        """The part of it that moments depend on."""
        return SubBatches(self.n, self.K, self.per_activation)


NO_MINIMUM = -math.inf


def number_of_sub_batches(form: str, rows: int, n: int, num_sub_batches: int | None) -> int:
    """Return K: 2 for "ratio" unless asked, else all; a last unpaired sub-batch of "ratio" takes no part."""
    if num_sub_batches is None:
        return 2 if form == "ratio" else rows // n
    return num_sub_batches // 2 * 2 if form == "ratio" else num_sub_batches


ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "tanh")
_FROM_OUTPUT = tuple(ACTIVATIONS.index(name) for name in ("identity", "relu", "tanh"))
_FROM_OUTPUT_IF_MONOTONE = tuple(ACTIVATIONS.index(name) for name in ("leaky_relu", "elu"))


class Activation(NamedTuple):
    """An activation function as kernels are told it, in the order of the registered ops' arguments."""

    kind: int  # index into ACTIVATIONS; "gelu_tanh" is gelu with approximate="tanh"
    parameter: float  # alpha of elu, negative_slope of leaky_relu

    @property
    def name(self) -> str:
        """Name in ACTIVATIONS."""
        return _named("activation", ACTIVATIONS, self.kind)

    @property
    def from_output(self) -> bool:
        """Whether the derivative follows from y, which the next layer saves anyway."""
        return self.kind in _FROM_OUTPUT or (self.kind in _FROM_OUTPUT_IF_MONOTONE and self.parameter >= 0)


IDENTITY = Activation(ACTIVATIONS.index("identity"), 0.0)

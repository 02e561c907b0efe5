"""What autograd calls: ``vcl_kernels/ops.py``, on registered ops, or Triton's functions under its interpreter."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..options import Activation, LossSpec, SubBatches


class Coefficients(NamedTuple):
    """``dx = scale · (x - mean) + shift``, in the accumulation dtype, ``(K, *units)`` each."""

    mean: Tensor
    scale: Tensor
    shift: Tensor | None = None


class Saved(NamedTuple):
    """What forward saved of x: a tensor of x's size and, if that is y, the rows of x that take part."""

    tensor: Tensor  # x, or y if from_output
    rows: Tensor | None = None  # the first K · n rows of x; None: ``tensor`` is x
    from_output: bool = False


class Backend(Protocol):
    """Arguments may have any strides. Results have x's memory format, and one value per unit has x's order of units.

    If no kernel can read x's strides, results are those of a contiguous x.
    ``dbeta`` has no elements unless ``beta_grad``, ``rows`` none unless ``keep_rows``.
    """

    def takes_one_pass(self, x: Tensor, spec: LossSpec) -> bool:
        """Whether loss and gradient come from one read of memory."""

    def loss(self, x: Tensor, beta: Tensor | None, spec: LossSpec) -> Tensor:
        """Return the loss alone."""

    def loss_dx(self, x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, dx and dbeta."""

    def loss_coefficients(
        self, x: Tensor, beta: Tensor | None, spec: LossSpec, beta_grad: bool, keep_rows: bool
    ) -> tuple[Tensor, Coefficients, Tensor, Tensor]:
        """Return the loss, the coefficients of dx, dbeta and the rows that take part."""

    def activation(
        self,
        x: Tensor,
        beta: Tensor | None,
        spec: LossSpec,
        activation: Activation,
        beta_grad: bool,
        keep_rows: bool,
    ) -> tuple[Tensor, Tensor, Coefficients, Tensor, Tensor]:
        """Return y, and then what ``loss_coefficients`` does."""

    def activation_dx(
        self,
        saved: Saved,
        dy: Tensor | None,
        coefficients: Coefficients,
        g: Tensor | None,
        activation: Activation,
        sub_batches: SubBatches,
        N: int,
    ) -> Tensor:
        """Return dx = dy · activation' + g · scale · (x - mean), N rows; a term without its upstream gradient is 0."""

    def moments(self, x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased variance of each sub-batch."""

    def moments_dx(
        self, x: Tensor, coefficients: Coefficients, g: Tensor | None, sub_batches: SubBatches, N: int
    ) -> Tensor:
        """Return dx = g · (scale · (x - mean) + shift), of N rows: zeros past the last sub-batch."""

    def multiply_(self, dx: Tensor, g: Tensor) -> None:
        """Multiply a dense ``dx`` by one value, without waiting for the device. (On CPUs autograd multiplies.)"""

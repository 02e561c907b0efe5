"""What forward saves for backward. This decides which kernels the two call.

Of a loss:

- at most half of the rows take part: those rows, and the coefficients. Backward makes dx.
- the backend computes loss and gradient from one read of x: dx. Backward multiplies it by the upstream gradient.
- else x, and the coefficients. Backward makes dx.

Of an activation and its loss, one tensor of x's size, as the bare activation saves: y, which the next layer saves
anyway, and the rows that take part, where the derivative follows from y and those rows are few; else x.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .backends.interface import Backend
from .options import Activation, LossSpec


def for_loss(x: Tensor, spec: LossSpec, backend: Backend) -> Literal["rows", "dx", "x"]:
    """Decide what the loss of ``x`` saves. "dx" saves x too, for second derivatives."""
    if _holds(2 * spec.K * spec.n <= x.shape[0]):
        return "rows"
    # Not dx in float16: a GradScaler's scale must multiply before rounding, or small values vanish. Nor if only beta
    # is learnt: dx is not wanted. Nor in an export: one graph serves all sizes.
    if x.dtype == torch.float16 or not x.requires_grad or torch.compiler.is_exporting():
        return "x"
    return "dx" if backend.takes_one_pass(x, spec) else "x"


def output_and_rows(x: Tensor, spec: LossSpec, activation: Activation) -> bool:
    """Whether an activation saves y and the rows that take part, rather than x."""
    if not activation.from_output:
        return False
    few_rows = _holds(spec.K * spec.n <= x.shape[0] // 2)
    return few_rows or (_holds(spec.K == 2) and _holds(2 * spec.n < x.shape[0]))


def apart_in_graph(x: Tensor, spec: LossSpec) -> bool:
    """Whether a compiler gets the bare activation, and the loss of the rows that take part, as two things.

    It fuses the activation with its neighbours, which saves more than reading a quarter of the rows twice costs.
    """
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiles and 4 * spec.K * spec.n <= x.shape[0]


def _holds(condition: bool | torch.SymBool) -> bool:
    """Return ``condition``. In an export one of a symbolic size is False: that choice is right for every size."""
    if type(condition) is bool:
        return condition
    return not torch.compiler.is_exporting() and bool(condition)

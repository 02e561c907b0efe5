"""dx *= g in place, doing nothing when g is 1: looked at on the device, so that the host never waits."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import RUN_TIME, Launch, cdiv, warps_for

TILE = 4096


class Tensors(NamedTuple):
    """What ``multiply`` reads and writes."""

    dx: Tensor
    g: Tensor


@triton.jit(do_not_specialize=RUN_TIME)
def multiply(tensors, E, ALIGNED: tl.constexpr, ACC: tl.constexpr, EB: tl.constexpr):
    """Program: EB of the E · ALIGNED elements of dx, which are dense in memory."""
    g = tl.load(tensors.g).to(ACC)
    if g != 1.0:
        at = tl.program_id(0).to(tl.int64) * EB + tl.arange(0, EB)
        mask = at < E.to(tl.int64) * ALIGNED
        dx = tl.load(tensors.dx + at, mask=mask, other=0.0).to(ACC)
        tl.store(tensors.dx + at, (dx * g).to(tensors.dx.dtype.element_ty), mask=mask)


def plan(elements: int) -> Launch:
    """Decide the launch."""
    by, tile = math.gcd(16, elements), {"EB": TILE}
    grid = (cdiv(elements, TILE),)
    return Launch(multiply, grid, {"E": elements // by}, {"ALIGNED": by, **tile}, tile, warps_for(TILE))

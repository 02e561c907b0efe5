"""dx *= g in place, doing nothing when g is 1: looked at on the device, so that the host never waits."""

import triton
import triton.language as tl

from .launch import RUN_TIME, Launch, Settings, aligned, cdiv, warps_for

TILE = 4096


@triton.jit(do_not_specialize=RUN_TIME)
def multiply(dx_ptr, g_ptr, E, ALIGNED: tl.constexpr, ACC: tl.constexpr, EB: tl.constexpr):
    """Program: EB of the E · ALIGNED elements of dx, which are dense in memory."""
    g = tl.load(g_ptr).to(ACC)
    if g != 1.0:
        at = tl.program_id(0).to(tl.int64) * EB + tl.arange(0, EB)
        mask = at < E.to(tl.int64) * ALIGNED
        dx = tl.load(dx_ptr + at, mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + at, (dx * g).to(dx_ptr.dtype.element_ty), mask=mask)


def rule() -> Settings:
    """Choose settings."""
    return Settings({"EB": TILE}, warps_for(TILE))


def plan(elements: int, settings: Settings | None = None) -> tuple[Launch, tuple[int, ...]]:
    """Decide the launch and its shape argument."""
    tile, warps, _ = settings or rule()
    by, sizes = aligned((elements,))
    return Launch(multiply, (cdiv(elements, tile["EB"]),), {"ALIGNED": by, **tile}, warps), sizes

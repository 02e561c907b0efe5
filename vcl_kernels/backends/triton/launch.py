"""A launch as a plain value, decided without a device: tests compile any of them ahead of time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ...geometry import Geometry

# Arguments that change from batch to batch, the last of an epoch being shorter: kernels are not specialised for them.
RUN_TIME = ("N", "K", "n", "splits", "tiles_per_split")


class Launch(NamedTuple):
    """A kernel, its grid, what it is specialised for and how many warps run it."""

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    warps: int

    def __call__(self, *args: Any) -> None:
        """Run the kernel on the device of its tensors."""
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            self.kernel[self.grid](*args, **self.constants, num_warps=self.warps)


class Settings(NamedTuple):
    """What a launch is free to choose: its tile (axes to powers of two), its warps, and programs to split data over."""

    tile: dict[str, int]
    warps: int
    splits: int = 1


def power_of_2(value: int) -> int:
    """Return the least power of two that is not below ``value``."""
    power = 1
    while power < value:  # of a symbolic size, torch.compile learns a range so; bit_length would need its value
        power *= 2
    return power


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def fitting(size: int, most: int) -> int:
    """Return the power of two from 512 to ``most`` whose multiples cover ``size`` with the least padding.

    The largest of equals; for a small ``size`` the power that covers it.
    """
    powers = [2**e for e in range(power_of_2(min(size, most)).bit_length() - 1, 8, -1)]
    return min(powers or [power_of_2(size)], key=lambda power: cdiv(size, power) * power)


def warps_for(elements: int) -> int:
    """Return warps that leave each thread at most 32 elements of a tile; 16 warps at most."""
    return min(16, max(1, power_of_2(cdiv(elements, 1024))))


_MOST_CONSTANT_POSITIONS = 16
_constant_positions: set[int] = set()


def positions_constant(P: int) -> int:
    """Return P for a kernel specialised on it (which keeps accesses 128 bits wide), or 0 for a run-time P.

    The first sizes that a process meets get kernels of their own. Where sizes keep changing (detection,
    audio), the rest share one, instead of compiling without end.
    """
    if P not in _constant_positions and len(_constant_positions) >= _MOST_CONSTANT_POSITIONS:
        return 0
    _constant_positions.add(P)
    return P


def dense_units(g: Geometry) -> bool:
    """Whether channels follow one another without a gap, so that their distance is P."""
    return g.unit_stride == g.P


def arguments(x: Geometry, to: Geometry) -> tuple[int, ...]:
    """Return the shape arguments of a kernel from ``x`` to ``to``: in the layout of x, and of the rows of ``to``."""
    if x.spatial:
        return to.N, x.K, x.n, x.U, x.P, x.row_stride, x.unit_stride, to.row_stride, to.unit_stride
    return to.N, x.K, x.n, x.U, x.P, x.row_stride, x.pos_stride, to.row_stride, to.pos_stride

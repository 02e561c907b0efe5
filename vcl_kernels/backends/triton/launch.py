"""A launch as a plain value, decided without a device: tests compile any of them ahead of time."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ...geometry import Geometry

# Arguments that no kernel is specialised for: shapes and distances. How far distances are aligned is a constant.
RUN_TIME = (
    *("N", "K", "n", "U", "P", "M", "E", "x_row", "x_step", "x_pos", "to_row", "to_step", "to_pos"),
    *("plane", "splits", "tiles_per_split", "rows", "parts", "run_units", "groups"),
)

WARPS = 2048  # wanted of a launch at least: what an H100 holds of 128 registers

MOST_PROGRAMS = 2**31 - 1
ROOM = 2**16  # that a tile may reach past a size, counted in 32 bits; sizes from 2^31 on are counted in 64


class Launch(NamedTuple):
    """A kernel, its grid, what it is specialised for, how many warps run it, and registers of a thread at most.

    Told how many it may take, NVIDIA's assembler does not move values to memory for the sake of more warps.
    """

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    warps: int
    registers: int = 128  # of which a multiprocessor has as many as 16 warps take

    def __call__(self, *args: Any) -> None:
        """Run the kernel on the device of its tensors."""
        if self.grid[0] > MOST_PROGRAMS:
            raise ValueError(f"x would take {self.grid[0]} programs; a launch has at most {MOST_PROGRAMS}")
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            limit = {} if torch.version.hip else {"maxnreg": self.most_registers}
            self.kernel[self.grid](*args, **self.constants, num_warps=self.warps, **limit)

    @property
    def most_registers(self) -> int:
        """Registers of a thread at most, with which a multiprocessor can still hold a program."""
        return min(self.registers, 2048 // self.warps)


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


def fitting(size: int, least: int, most: int) -> int:
    """Return the power of two from ``least`` to ``most`` whose multiples cover ``size`` with the least padding.

    The largest of equals; for a small ``size`` the power that covers it.
    """
    powers = [2**e for e in range(most.bit_length() - 1, least.bit_length() - 2, -1) if 2**e < 2 * size]
    return min(powers or [power_of_2(size)], key=lambda power: cdiv(size, power) * power)


def warps_for(elements: int) -> int:
    """Return warps that leave each thread at most 32 elements of a tile; 16 warps at most."""
    return min(16, max(1, power_of_2(cdiv(elements, 1024))))


def aligned(distances: tuple[int, ...], most: int = 16) -> tuple[int, tuple[int, ...]]:
    """Return the alignment of ``distances``, and how many times it they are.

    It is the greatest power of two that divides all of them; at most ``most``, itself one, and 16 is all that an access
    can use.
    """
    by = math.gcd(most, *distances)
    return by, tuple(distance // by for distance in distances)


def even(x: Geometry) -> bool:
    """Whether all values of a unit lie one distance apart, across rows too."""
    return x.P == 1 or x.row_stride == x.P * x.pos_stride

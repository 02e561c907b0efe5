"""A launch as a plain value. It is decided without a device, so tests can compile any launch ahead of time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

# Sizes and distances: no kernel is specialised for them. Kernels take them one by one, as more than ten parameters:
# Triton 3.6 and 3.7 specialise each integer of a tuple, for 1 and for multiples of 16, whatever do_not_specialize says.
RUN_TIME = (
    *("N", "K", "n", "U", "P", "Q", "M", "E", "x_sub_batch", "x_sample", "x_row", "x_run", "to_row", "to_run"),
    *("m2_offset", "parts", "tiles_of_part", "rows_of_part", "blocks", "run_units"),
)

WARPS = 2048  # least warps of a launch: an H100 holds as many at 128 registers a thread

MOST_PROGRAMS = 2**31 - 1
# How far a tile may reach past a size. Sizes this close below 2^31 are refused; larger ones are counted in 64 bits.
ROOM = 2**16


class Launch(NamedTuple):
    """A kernel, its grid and sizes, what it is specialised for, its tile (powers of two by axis), warps and registers.

    NVIDIA's assembler is told how many registers a thread may take: else it spills some to have more warps resident.
    """

    kernel: Any
    grid: tuple[int, ...]
    sizes: dict[str, int]
    constants: dict[str, Any]
    tile: dict[str, int]
    warps: int
    registers: int = 128  # of a thread at most: a multiprocessor then holds 16 warps, as many as any program has

    @property
    def name(self) -> str:
        """Name of the kernel, and of the layout where it serves both."""
        T = self.constants.get("T")
        return self.kernel.__name__ + ("" if T is None else "_unit" if T.run_kind == "units" else "_spatial")

    def of(self, **constants: Any) -> Launch:
        """Specialise the kernel further."""
        return self._replace(constants={**self.constants, **constants})

    def __call__(self, tensors: tuple[torch.Tensor | None, ...], *scalars: float) -> None:
        """Run the kernel on the device of its tensors."""
        if self.grid[0] > MOST_PROGRAMS:
            raise ValueError(f"x would take {self.grid[0]} programs; a launch has at most {MOST_PROGRAMS}")
        device = next(t for t in tensors if t is not None).device
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            options = {"num_warps": self.warps}
            if not torch.version.hip:
                options["maxnreg"] = self.registers
            self.kernel[self.grid](tensors, *scalars, **self.sizes, **self.constants, **options)


def power_of_2(value: int) -> int:
    """Return the least power of two that is not below ``value``."""
    power = 1
    while power < value:  # of a symbolic size, torch.compile learns a range so; bit_length would need its value
        power *= 2
    return power


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def warps_for(elements: int) -> int:
    """Return warps that leave each thread at most 32 elements of a tile; 16 warps at most."""
    return min(16, max(1, power_of_2(cdiv(elements, 1024))))

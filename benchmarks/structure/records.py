"""From looks to records: each distinct kernel compiled once for each target, with its launch of fewest programs."""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Iterable
from typing import Any

import torch
import triton

from .build import Specialised, build, specialise
from .code import Code, Sass
from .launches import Recorded
from .shapes import Look, launches
from .targets import TARGETS, occupancy

Record = dict[str, Any]
_pending: list[tuple[Specialised, str, bool]] = []  # that worker processes inherit


def collect(looks: Iterable[Look], targets: list[str], sass: list[str], jobs: int) -> Record:
    """Compile and describe; ``sass``: targets whose binaries are disassembled too."""
    found: dict[Specialised, Record] = {}
    for look in looks:
        for call, launched in launches(look):
            described = _described(look, call, launched)
            kernel = found.setdefault(specialise(launched), {**described, "launches": 0})
            if described["programs"] < kernel["programs"]:
                kernel.update(described)
            kernel["launches"] += 1
    _pending[:] = [(specialised, target, target in sass) for specialised in found for target in targets]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        built = pool.imap(_built, range(len(_pending)), chunksize=4)
        for index, ((specialised, target, _), code) in enumerate(zip(_pending, built, strict=True)):
            if index % 100 == 0:
                print(f"{index} of {len(_pending)}", file=sys.stderr)
            found[specialised][target] = _for_target(target, found[specialised], *code)
    versions = {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}
    return {"versions": versions, "targets": targets, "kernels": list(found.values())}


def _built(index: int) -> tuple[Code, Sass | None]:
    return build(*_pending[index])


def _described(look: Look, call: str, launched: Recorded) -> Record:
    launch, tensors, _ = launched
    elements, padded = elements_of_tile(launched)
    element_size = sum(t.element_size() for t in _tensors_read(launched))
    return {
        "kernel": launch.name,
        "case": str(look),
        "call": call,
        "tile": launch.tile,
        "warps": launch.warps,
        "programs": math.prod(launch.grid),
        "bytes": elements * element_size,
        "padded_bytes": padded * element_size,
        "wide": allows_128_bits(launched),
        "writes": any(getattr(tensors, name, None) is not None for name in ("y", "dx")),
    }


def _tensors_read(launched: Recorded) -> list[Any]:
    """Tensors of the tile's size that a program reads."""
    launch, tensors, _ = launched
    kernel = launch.kernel.__name__
    if kernel == "backward":
        of_saved = launch.constants["ACTIVATION"] != "identity" if tensors.dy is not None else tensors.mean is not None
        return [tensors.dy] * (tensors.dy is not None) + [tensors.saved] * of_saved
    if kernel == "finalise":
        return [tensors.partial] * (1 if launch.sizes["parts"] == 1 else 2)
    return [tensors.dx if kernel == "multiply" else tensors.x]


def elements_of_tile(launched: Recorded) -> tuple[int, int]:
    """Elements of a tile: those that are there, and with padding."""
    launch, tile, sizes = launched.launch, launched.launch.tile, launched.launch.sizes
    if "EB" in tile:
        return min(tile["EB"], sizes["E"] * launch.constants["ALIGNED"]), tile["EB"]
    covers = {"PARTB": ("parts", 1), "KB": ("K", 1), "UB": ("U", 1)}
    if "NB" in tile:
        T = launch.constants["T"]
        tile = {"KB": tile.get("KB", 1), "NB": T.NB * T.MB, "FB": T.FB // T.MB}
        covers = {"KB": ("K", 1), "NB": ("n", 1), "FB": ("P", min(launch.tile["UB"], sizes["U"]))}
    there = (min(size, sizes[covers[axis][0]] * covers[axis][1]) for axis, size in tile.items())
    return math.prod(there), math.prod(tile.values())


def allows_128_bits(launched: Recorded) -> bool:
    """Whether a row of the tile, and every distance between rows, is a multiple of 16 bytes."""
    constants, tile = launched.launch.constants, launched.launch.tile
    if "PARTB" in tile:
        return False
    size = min(t.element_size() for t in _tensors_read(launched))
    row = next(tile[axis] for axis in ("EB", "FB", "UB") if axis in tile)
    aligned = constants["ALIGNED"] if "EB" in tile else constants["T"].aligned
    return aligned * size % 16 == 0 and row * size % 16 == 0


def _for_target(target: str, kernel: Record, code: Code, sass: Sass | None) -> Record:
    resident = occupancy(target, kernel["warps"], code.registers, code.shared, code.compiler_warps_of_partition)
    return {
        **code._asdict(),
        "resident_warps": resident.warps,
        "waves": round(kernel["programs"] / (resident.blocks * TARGETS[target].multiprocessors), 3),
        "in_flight_when_full": resident.blocks * kernel["bytes"],
        "accesses_when_full": resident.blocks * kernel["padded_bytes"],
        **({} if sass is None else {"sass": sass._asdict()}),
    }

"""From looks to records: each distinct kernel compiled once for each target, with its launch of fewest programs."""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Iterable
from typing import Any

import torch
import triton

from benchmarks.structure.launches import Recorded

from .build import Specialised, build, specialise
from .code import Code, Sass
from .shapes import Look, launches
from .targets import TARGETS, occupancy

Record = dict[str, Any]
_pending: list[tuple[Any, Specialised, str, bool]] = []  # that worker processes inherit


def collect(looks: Iterable[Look], targets: list[str], sass: list[str], jobs: int) -> Record:
    """Compile and describe; ``sass``: targets whose binaries are disassembled too."""
    found: dict[Specialised, Record] = {}
    kernels: dict[Specialised, Any] = {}
    for look in looks:
        for name, one in launches(look):
            of = specialise(one)
            row = _described(look, name, one)
            if of not in found:
                found[of] = {**row, "launches": 0}
                kernels[of] = one.launch.kernel
            elif row["programs"] < found[of]["programs"]:
                found[of].update(row)
            found[of]["launches"] += 1
    _pending[:] = [(kernels[of], of, target, target in sass) for of in found for target in targets]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for index, built in enumerate(pool.imap(_built, range(len(_pending)), chunksize=4)):
            _, of, target, _ = _pending[index]
            found[of][target] = _for_target(target, found[of], *built)
    versions = {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}
    return {"versions": versions, "targets": targets, "kernels": list(found.values())}


def _built(index: int) -> tuple[Code, Sass | None]:
    if index % 100 == 0:
        print(f"{index} of {len(_pending)}", file=sys.stderr)
    return build(*_pending[index])


def _described(look: Look, name: str, one: Recorded) -> Record:
    launch, size = one.launch, sum(t.element_size() for t in _tensors_read(one))
    elements, padded = elements_of_tile(one)
    return {
        "kernel": one.launch.name,
        "case": str(look),
        "call": name,
        "tile": launch.settings.tile,
        "warps": launch.settings.warps,
        "programs": math.prod(launch.grid),
        "bytes": elements * size,
        "padded_bytes": padded * size,
        "wide": allows_128_bits(one),
        "writes": any(getattr(one.tensors, name, None) is not None for name in ("y", "dx")),
    }


def _tensors_read(one: Recorded) -> list[Any]:
    """Tensors of the tile's size that a program reads."""
    launch, tensors = one.launch, one.tensors
    kernel = launch.kernel.__name__
    if kernel == "backward":
        of_saved = launch.constants["ACTIVATION"] != "identity" if tensors.dy is not None else tensors.mean is not None
        return [tensors.dy] * (tensors.dy is not None) + [tensors.saved] * of_saved
    if kernel == "finalise":
        return [tensors.partial] * (1 if launch.sizes["parts"] == 1 else 2)
    return [tensors.dx if kernel == "multiply" else tensors.x]


def elements_of_tile(one: Recorded) -> tuple[int, int]:
    """Elements of a tile: those that are there, and with padding."""
    launch, tile, sizes = one.launch, one.launch.settings.tile, one.launch.sizes
    if "EB" in tile:
        return min(tile["EB"], sizes["E"] * launch.constants["ALIGNED"]), tile["EB"]
    covers = {"SB": ("parts", 1), "KB": ("K", 1), "UB": ("U", 1)}
    if "NB" in tile:
        T = launch.constants["T"]
        tile = {"KB": tile.get("KB", 1), "NB": T.NB * T.MB, "FB": T.FB // T.MB}
        covers = {"KB": ("K", 1), "NB": ("n", 1), "FB": ("P", min(launch.settings.tile["UB"], sizes["U"]))}
    there = (min(size, sizes[covers[axis][0]] * covers[axis][1]) for axis, size in tile.items())
    return math.prod(there), math.prod(tile.values())


def allows_128_bits(one: Recorded) -> bool:
    """Whether a row of the tile, and every distance between rows, is a multiple of 16 bytes."""
    constants, tile = one.launch.constants, one.launch.settings.tile
    if "SB" in tile:
        return False
    size = min(t.element_size() for t in _tensors_read(one))
    row = next(tile[axis] for axis in ("EB", "FB", "UB") if axis in tile)
    aligned = constants["ALIGNED"] if "EB" in tile else constants["T"].aligned
    return aligned * size % 16 == 0 and row * size % 16 == 0


def _for_target(target: str, row: Record, code: Code, sass: Sass | None) -> Record:
    at_once = occupancy(target, row["warps"], code.registers, code.shared, code.occupancy)
    found = {
        "registers": code.registers,
        "shared": code.shared,
        "spills": code.spills,
        "loads": code.loads,
        "stores": code.stores,
        "blocks": at_once.blocks,
        "resident_warps": at_once.warps,
        "waves": round(row["programs"] / (at_once.blocks * TARGETS[target].multiprocessors), 3),
        "in_flight_when_full": at_once.blocks * row["bytes"],
        "accesses_when_full": at_once.blocks * row["padded_bytes"],
    }
    if code.occupancy is not None:
        found["compiler_warps_of_partition"] = code.occupancy
    if sass is not None:
        found["sass"] = sass._asdict()
    return found

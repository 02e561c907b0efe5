"""From looks to records: each distinct kernel compiled once for each target, with its launch of fewest programs."""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Iterable
from typing import Any

import torch
import triton

from benchmarks.launches import Recorded, elements_of_tile, tile_of, values_of

from .build import Specialised, build, specialise
from .code import Code
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
    work = [(of, target) for of in found for target in targets]
    _pending[:] = [(kernels[of], of, target, target in sass) for of, target in work]
    for (of, target), built in zip(work, _all_built(jobs), strict=True):
        found[of][target] = _for_target(target, found[of], *built)
    _pending.clear()
    versions = {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}
    return {"versions": versions, "targets": targets, "kernels": list(found.values())}


def _all_built(jobs: int) -> Iterable[tuple[Code, Any]]:
    if jobs == 1:
        for index in range(len(_pending)):
            yield _built(index)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_built, range(len(_pending)), chunksize=4)


def _built(index: int) -> tuple[Code, Any]:
    if index % 100 == 0:
        print(f"{index} of {len(_pending)}", file=sys.stderr)
    return build(*_pending[index])


def _described(look: Look, name: str, one: Recorded) -> Record:
    launch = one.launch
    return {
        "kernel": launch.kernel.__name__,
        "case": str(look),
        "call": name,
        "tile": tile_of(launch),
        "warps": launch.warps,
        "programs": math.prod(launch.grid),
        "bytes": elements_of_tile(one) * bytes_of_element(one),
        "padded_bytes": padded_elements_of_tile(one) * bytes_of_element(one),
        "wide": allows_128_bits(one),
        "writes": any(values_of(one).get(name) is not None for name in ("y_ptr", "dx_ptr")),
    }


def _tensors_read(one: Recorded) -> list[Any]:
    given = values_of(one)
    kernel = one.launch.kernel.__name__
    if kernel.startswith("apply"):
        activation = one.launch.constants["ACTIVATION"] != "identity"
        with_saved = activation if given["dy_ptr"] is not None else given["mean_ptr"] is not None
        return [given["dy_ptr"]] * (given["dy_ptr"] is not None) + [given["saved_ptr"]] * with_saved
    if kernel == "finalise":
        return [given["partial_ptr"]] * (1 if given["splits"] == 1 else 2)
    return [given["dx_ptr" if kernel == "multiply" else "x_ptr"]]


def padded_elements_of_tile(one: Recorded) -> int:
    """Elements of a tile, padding included."""
    tile = tile_of(one.launch)
    if "FB" in tile:
        tile.pop("UB", None)
    return math.prod(tile.values())


def bytes_of_element(one: Recorded) -> int:
    """Bytes that a program reads for an element of its tile, of all tensors together."""
    return sum(t.element_size() for t in _tensors_read(one) if t is not None)


def allows_128_bits(one: Recorded) -> bool:
    """Whether a row of the tile, and every distance between rows, is a multiple of 16 bytes."""
    constants, tile = one.launch.constants, tile_of(one.launch)
    if "ALIGNED" not in constants:
        return False
    size = min(t.element_size() for t in _tensors_read(one) if t is not None)
    row = next(tile[axis] for axis in ("EB", "FB", "UB") if axis in tile)
    return constants["ALIGNED"] * size % 16 == 0 and row * size % 16 == 0


def _for_target(target: str, row: Record, code: Code, sass: Any) -> Record:
    at_once = occupancy(target, row["warps"], code.registers, code.shared, code.occupancy)
    of = TARGETS[target]
    resident = min(at_once.blocks, row["programs"] / of.multiprocessors)
    found = {
        "registers": code.registers,
        "shared": code.shared,
        "spills": code.spills,
        "loads": code.loads,
        "stores": code.stores,
        "blocks": at_once.blocks,
        "resident_warps": at_once.warps,
        "limit": at_once.limit,
        "waves": round(row["programs"] / (at_once.blocks * of.multiprocessors), 3),
        "in_flight": int(resident * row["bytes"]),
        "in_flight_when_full": at_once.blocks * row["bytes"],
        "accesses_when_full": at_once.blocks * row["padded_bytes"],
    }
    if code.occupancy is not None:
        found["compiler_warps_of_partition"] = code.occupancy
    if sass is not None:
        found["sass"] = sass._asdict()
    return found

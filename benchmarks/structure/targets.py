"""The GPUs that kernels are compiled for: their limits, and the occupancy that follows from them.

Sources. sm_80, sm_90, sm_100: "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide;
granules as in cuda_occupancy.h of the CUDA toolkit. gfx942: AMDGPUUsage and GCNSubtarget of LLVM (whose own figure
a test compares). Multiprocessors and bandwidth: data sheets of A100 80GB SXM, H200 SXM, B200 and MI300X.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """A multiprocessor (compute unit), and how many there are."""

    device: str
    multiprocessors: int
    gigabytes_per_second: int
    lanes: int  # threads of a warp
    warps: int
    blocks: int
    registers: int  # for each lane of a partition's warps together; a multiprocessor has four partitions
    register_granule: int  # registers are given to each lane in multiples of this
    shared: int  # bytes
    shared_granule: int
    shared_reserved: int  # bytes of each block that the system keeps


TARGETS = {
    "sm_80": Limits("A100", 108, 2039, 32, 64, 32, 512, 8, 164 << 10, 128, 1024),
    "sm_90": Limits("H200", 132, 4800, 32, 64, 32, 512, 8, 228 << 10, 128, 1024),
    "sm_100": Limits("B200", 148, 8000, 32, 64, 32, 512, 8, 228 << 10, 128, 1024),
    "gfx942": Limits("MI300X", 304, 5300, 64, 32, 16, 512, 8, 64 << 10, 512, 0),
}
PARTITIONS = 4
LATENCY = 1e-6  # seconds of a read under load, rounded up


class Occupancy(NamedTuple):
    """What is resident on a multiprocessor when nothing but the kernel's own needs limits it."""

    blocks: int
    warps: int
    limit: str  # what stops one more block


def occupancy(target: str, warps: int, registers: int, shared: int, warps_of_partition: int | None = None) -> Occupancy:
    """Blocks on a multiprocessor: the least that warps, blocks, registers and shared memory allow.

    Registers: a partition holds floor(512 / registers rounded up to a multiple of 8) warps, and there are four;
    no more than ``warps_of_partition``, where the compiler says so.
    """
    of = TARGETS[target]
    per_lane = _up(max(registers, 1), of.register_granule)
    in_partition = min(of.warps // PARTITIONS, of.registers // per_lane)
    in_partition = min(in_partition, warps_of_partition or in_partition)
    allowed = {
        "warps": of.warps // warps,
        "blocks": of.blocks if warps > 1 or of.lanes == 32 else of.warps,
        "registers": PARTITIONS * in_partition // warps,
    }
    if shared:
        allowed["shared memory"] = of.shared // (_up(shared, of.shared_granule) + of.shared_reserved)
    limit, blocks = min(allowed.items(), key=lambda item: item[1])  # the first of equal ones
    return Occupancy(blocks, blocks * warps, limit)


def bytes_to_keep_in_flight(target: str) -> int:
    """Bytes on their way to one multiprocessor at full bandwidth (Little's law): bandwidth · latency / their count."""
    of = TARGETS[target]
    return int(of.gigabytes_per_second * 1e9 * LATENCY / of.multiprocessors)


def _up(value: int, granule: int) -> int:
    return -(-value // granule) * granule

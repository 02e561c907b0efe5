"""Speed of vcl_loss on the CPU beside the copy, batch norm and the reference: ``make bench``.

Every candidate runs once in each round, so that noise and caches hit all alike; the table has ratios of medians.
``--out FILE`` keeps all samples. Run it with an allocator that keeps memory (the Makefile sets glibc so): fresh
pages cost more than the arithmetic of any candidate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import vcl_kernels as vk

SHAPES = [(64, 64, 56, 56), (128, 192, 32, 32), (64, 512, 14, 14), (64, 512, 7, 7), (256, 8192), (32, 64)]


def candidates(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    x = torch.randn(shape, requires_grad=True)
    data, out, g = x.detach(), torch.empty(shape), torch.randn(shape)
    C = shape[1]
    w, b = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    mean, var = torch.zeros(C), torch.ones(C)

    def backward(value: torch.Tensor, upstream: torch.Tensor | None = None) -> None:
        x.grad = w.grad = b.grad = None
        value.backward(upstream)

    return {
        "copy": lambda: out.copy_(data),
        "batch_norm": lambda: backward(F.batch_norm(x, mean, var, w, b, True), g),
        "relative_variance": lambda: backward(vk.vcl_loss(x, form="relative_variance", sub_batch_size=8)),
        "ratio": lambda: backward(vk.vcl_loss(x)),
        "reference": lambda: backward(vk.reference.vcl_loss(x, form="relative_variance", sub_batch_size=8)),
    }


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after two rounds to warm up."""
    runs = candidates(shape)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", help="write all samples to this JSON file")
    options = parser.parse_args()
    keeping = "MALLOC_TRIM_THRESHOLD_" in os.environ
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32; keeping allocator: {keeping}")
    print("forward + backward; relative_variance with n = 8, ratio with one pair of n = 5; ratios of medians")
    print(f"{'shape':>18} {'copy ms':>8} {'rv/copy':>8} {'rv/bn':>7} {'rv/ref':>7} {'ratio/copy':>10} {'ratio/bn':>8}")
    results = []
    for shape in SHAPES:
        rounds = options.rounds if torch.Size(shape).numel() > 100_000 else 20 * options.rounds
        samples = measure(shape, rounds)
        m = {name: statistics.median(times) for name, times in samples.items()}
        rv, ratio = m["relative_variance"], m["ratio"]
        print(
            f"{'x'.join(map(str, shape)):>18} {m['copy'] * 1e3:8.3f} {rv / m['copy']:8.2f} {rv / m['batch_norm']:7.3f} "
            f"{rv / m['reference']:7.3f} {ratio / m['copy']:10.2f} {ratio / m['batch_norm']:8.3f}"
        )
        results.append({"shape": shape, "median_seconds": m, "seconds": samples})
    if options.out:
        device = {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
        versions = {"torch": torch.__version__, "vcl_kernels": vk.__version__, "python": platform.python_version()}
        record = {**device, **versions, "threads": torch.get_num_threads(), "keeping_allocator": keeping}
        with open(options.out, "w") as file:
            json.dump({**record, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()

"""Speed on the CPU of vcl_loss and vcl_activation beside the copy, the bare activation and batch norm: ``make bench``.

Every candidate runs once in each round, so that noise and caches hit all alike; the table has ratios of medians, of
forward + backward in fp32. ``--out FILE`` keeps all samples. The Makefile runs it with glibc's allocator as it is, and
set to keep memory, as jemalloc and tcmalloc do: fresh pages cost more than the arithmetic of any candidate.
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

from .table import table

SHAPES = [(64, 64, 56, 56), (128, 192, 32, 32), (64, 512, 14, 14), (64, 512, 7, 7), (256, 8192), (32, 64)]


Candidates = dict[str, Callable[[], object]]


class Inputs:
    """Tensors of one shape, and batch norm over them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.x = torch.randn(shape, requires_grad=True)
        self.dy, self.out = torch.randn(shape), torch.empty(shape)
        C = shape[1]
        self.affine = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
        self.running = torch.zeros(C), torch.ones(C)

    def batch_norm(self) -> torch.Tensor:
        return F.batch_norm(self.x, *self.running, *self.affine, True)

    def backward(self, outputs: list[torch.Tensor], upstream: list[torch.Tensor | None]) -> None:
        self.x.grad = self.affine[0].grad = self.affine[1].grad = None
        torch.autograd.backward(outputs, upstream)


def losses(i: Inputs) -> Candidates:
    def loss(function: Callable[..., torch.Tensor], **options: object) -> Callable[[], None]:
        return lambda: i.backward([function(i.x, **options)], [None])

    every = {"form": "relative_variance", "sub_batch_size": 8}
    return {
        "copy": lambda: i.out.copy_(i.x.detach()),
        "batch_norm": lambda: i.backward([i.batch_norm()], [i.dy]),
        "relative_variance": loss(vk.vcl_loss, **every),
        "ratio": loss(vk.vcl_loss),
        "reference": loss(vk.reference.vcl_loss, **every),
    }


def activations(i: Inputs) -> Candidates:
    def fused(name: str, **options: object) -> Callable[[], None]:
        return lambda: i.backward(list(vk.vcl_activation(i.x, name, **options)), [i.dy, None])  # type: ignore[arg-type]

    found: Candidates = {
        "copy": lambda: i.out.copy_(i.x.detach()),
        "batch_norm elu": lambda: i.backward([F.elu(i.batch_norm())], [i.dy]),
    }
    for name, bare in (("elu", F.elu), ("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)):
        found[name] = lambda bare=bare: i.backward([bare(i.x)], [i.dy])  # type: ignore[misc]
        found[f"{name} ratio"] = fused(name)
        found[f"{name} relative_variance"] = fused(name, form="relative_variance", sub_batch_size=8)
    return found


SUITES = {"loss": losses, "activation": activations}


def measure(suite: str, shape: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after two rounds to warm up."""
    runs = SUITES[suite](Inputs(shape))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", help="write all samples to this JSON file")
    options = parser.parse_args()
    keeping = "MALLOC_TRIM_THRESHOLD_" in os.environ
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32; keeping allocator: {keeping}")
    results = []
    for shape in SHAPES:
        rounds = options.rounds if torch.Size(shape).numel() > 100_000 else 20 * options.rounds
        samples = measure(options.suite, shape, rounds)
        median = {name: statistics.median(times) for name, times in samples.items()}
        results.append({"shape": shape, "median_seconds": median, "seconds": samples})
    device = {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
    versions = {"torch": torch.__version__, "vcl_kernels": vk.__version__, "python": platform.python_version()}
    settings = {"suite": options.suite, "threads": torch.get_num_threads(), "keeping_allocator": keeping}
    record = {**device, **versions, **settings, "results": results}
    print(table(record))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()

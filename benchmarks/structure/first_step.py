"""What a first training step compiles: a network's fused activations, forward and backward, cold."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.cases import ELU_11, Case
from benchmarks.launches import activation_jobs, recorded, spec_of

from .build import Specialised, build, specialise

# Channels, height = width; benchmarks.cases has one for each stage
ACTIVATIONS_OF_RESNET_50 = [
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
]
ACTIVATIONS_OF_RESNET_50 += [(512, 14), (512, 7), (2048, 7)]


class Network(NamedTuple):
    """Activations by the cases of their inputs."""

    name: str
    activation: str
    cases: list[Case]


def networks() -> list[Network]:
    """Return a convolutional network in both layouts, the authors' own, and a transformer."""
    resnet = [(64, channels, size, size) for channels, size in ACTIVATIONS_OF_RESNET_50]
    return [
        Network("ResNet-50", "relu", [Case(shape, dtype="bfloat16") for shape in resnet]),
        Network("ResNet-50, channels_last", "relu", [Case(shape, "channels_last", "bfloat16") for shape in resnet]),
        Network("ELU-11", "elu", [Case(shape) for shape in ELU_11]),
        Network("ViT-B/16", "gelu", [Case((64, 3072, 197), "tokens", "bfloat16")]),
    ]


def kernels_of(network: Network, form: str) -> dict[Specialised, Any]:
    """Return each different kernel of a step with its function."""
    found: dict[Specialised, Any] = {}
    for case in network.cases:
        x = case.tensor("meta")
        jobs = activation_jobs(x, spec_of(x, form), network.activation)
        for name in (network.activation, f"dx of {network.activation} and loss"):
            found |= {specialise(one): one.launch.kernel for one in recorded(jobs[name])}
    return found


def first_steps(target: str) -> list[dict[str, Any]]:
    """Count and compile, by one process with an empty cache."""
    rows = []
    for network in networks():
        for form in ("ratio", "relative_variance"):
            kernels = kernels_of(network, form)
            with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
                start = time.perf_counter()
                for of, kernel in kernels.items():
                    build(kernel, of, target)
                seconds = time.perf_counter() - start
            rows.append({"network": network.name, "form": form, "kernels": len(kernels), "seconds": round(seconds, 1)})
    return rows

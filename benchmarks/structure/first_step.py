"""What a first training step compiles: a network's fused activations, forward and backward, cold."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from typing import Any
from unittest import mock

from benchmarks.cases import ELU_11, Case
from benchmarks.structure.launches import activation_jobs, recorded, spec_of

from .build import Specialised, build, specialise

# Channels, height = width; benchmarks.cases has one for each stage
ACTIVATIONS_OF_RESNET_50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)


def networks() -> list[tuple[str, str, list[Case]]]:
    """Name, activation and the cases of its inputs: a convolutional network, the authors' own, and a transformer."""
    resnet = [(64, channels, size, size) for channels, size in ACTIVATIONS_OF_RESNET_50]
    return [
        ("ResNet-50", "relu", [Case(shape, dtype="bfloat16") for shape in resnet]),
        ("ResNet-50, channels_last", "relu", [Case(shape, "channels_last", "bfloat16") for shape in resnet]),
        ("ELU-11", "elu", [Case(shape) for shape in ELU_11]),
        ("ViT-B/16", "gelu", [Case((64, 3072, 197), "tokens", "bfloat16")]),
    ]


def kernels_of(activation: str, cases: list[Case], form: str) -> dict[Specialised, Any]:
    """Return each different kernel of a step with its function."""
    found: dict[Specialised, Any] = {}
    for case in cases:
        x = case.tensor("meta")
        jobs = activation_jobs(x, spec_of(x, form), activation)
        for name in (activation, f"dx of {activation} and loss"):
            found |= {specialise(one): one.launch.kernel for one in recorded(jobs[name])}
    return found


def first_steps(target: str) -> list[dict[str, Any]]:
    """Count and compile, by one process with an empty cache."""
    rows = []
    for (network, activation, cases), form in itertools.product(networks(), ("ratio", "relative_variance")):
        kernels = kernels_of(activation, cases, form)
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            start = time.perf_counter()
            for of, kernel in kernels.items():
                build(kernel, of, target)
            seconds = time.perf_counter() - start
        rows.append({"network": network, "form": form, "kernels": len(kernels), "seconds": round(seconds, 1)})
    return rows

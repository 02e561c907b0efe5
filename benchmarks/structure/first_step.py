"""What a first training step compiles: a network's fused activations, forward and backward, cold."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from typing import Any
from unittest import mock

from benchmarks.cases import ELU_11, Case

from .build import Specialised, build, specialise
from .shapes import Look, launches

# Channels, height = width; benchmarks.cases has one for each stage
ACTIVATIONS_OF_RESNET_50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)
RESNET = [(64, channels, size, size) for channels, size in ACTIVATIONS_OF_RESNET_50]
# Activation and the cases of its inputs: a convolutional network, the authors' own, and a transformer
NETWORKS = {
    "ResNet-50": ("relu", [Case(shape, dtype="bfloat16") for shape in RESNET]),
    "ResNet-50, channels_last": ("relu", [Case(shape, "channels_last", "bfloat16") for shape in RESNET]),
    "ELU-11": ("elu", [Case(shape) for shape in ELU_11]),
    "ViT-B/16": ("gelu", [Case((64, 3072, 197), "tokens", "bfloat16")]),
}


def kernels_of(activation: str, cases: list[Case], form: str) -> dict[Specialised, None]:
    """Return each different kernel of a step."""
    calls = (f"{form}: {activation}", f"{form}: dx of {activation} and loss")
    looks = (Look(case, (form,), activations=(activation,)) for case in cases)
    return {specialise(found): None for look in looks for call, found in launches(look) if call in calls}


def first_steps(target: str) -> list[dict[str, Any]]:
    """Count and compile, by one process with an empty cache."""
    found = []
    for (network, step), form in itertools.product(NETWORKS.items(), ("ratio", "relative_variance")):
        kernels = kernels_of(*step, form)
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            start = time.perf_counter()
            for kernel in kernels:
                build(kernel, target)
            seconds = time.perf_counter() - start
        found.append({"network": network, "form": form, "kernels": len(kernels), "seconds": round(seconds, 1)})
    return found

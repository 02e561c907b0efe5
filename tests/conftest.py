"""What tests share: backends and where they run, layouts, and the error budget."""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels then run on CPU tensors

import vcl_kernels as vk  # noqa: E402

BACKENDS = ("reference", "cpu", "triton")
FORMS = ("ratio", "variance", "relative_variance")
UNITS = ("channel", "activation")


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and GPU else "cpu"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend; one that cannot run here fails the test, because every one must be tested."""
    assert vk.backends()[request.param] == "available"
    return request.param


@pytest.fixture(params=("cpu", "triton"))
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """The backends that have kernels."""
    assert vk.backends()[request.param] == "available"
    return request.param

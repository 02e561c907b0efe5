"""Fixtures: backends and where they run, the seed, threads, the compiler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels then run on CPU tensors

import vcl_kernels as vk  # noqa: E402


def pairwise_sums() -> None:
    """Let the interpreter add pairwise, as a GPU's threads and shuffles do; numpy adds rows one after another."""
    import numpy as np
    from triton.runtime.interpreter import ReduceOps

    def total(self, input):
        data = np.moveaxis(input.handle.data, self.axis, 0) if self.axis is not None else input.handle.data.ravel()
        while len(data) > 1:  # tiles are powers of two
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        data = np.expand_dims(data[0], self.axis) if self.keep_dims else data[0]
        return self.to_tensor(data, input.dtype)

    ReduceOps.sum = total


def patch_the_language_once() -> None:
    """Halve the interpreter's time: each call of a device function patches all of triton.language again."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()  # noqa: SLF001

    def patch_once(function):
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once  # noqa: SLF001


if not GPU:
    pairwise_sums()
    patch_the_language_once()


def pytest_runtest_logfinish() -> None:
    """After an illegal access every later test of this process would fail: end it, for xdist to start another."""
    if GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


BACKENDS = ("reference", "cpu", "triton")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same numbers in every test, whichever ran before; drawn on the CPU, the same on every machine."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> None:
    """Forget what was compiled before, which otherwise counts as a recompilation."""
    torch.compiler.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the studies run: one thread, so that small networks do not wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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

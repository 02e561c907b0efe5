"""What tests of CUDA tensors share. In a rehearsal, without a GPU, their bodies run in Triton's interpreter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import GPU

REHEARSING = os.environ.get("VCL_KERNELS_REHEARSE") == "1" and not GPU
DEVICE = "cuda" if GPU else "cpu"

needs_device = pytest.mark.skipif(
    not GPU and not REHEARSING, reason="no CUDA device; `make gpu-check ARGS=--rehearse` runs it in the interpreter"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device; this has no rehearsal")


def sized(on_gpu, rehearsed):
    """What a test works on: as large as a kernel meets it, or small enough for the interpreter."""
    return on_gpu if GPU else rehearsed


def replayed(step: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    """A CUDA graph of ``step`` as a function; in a rehearsal ``step`` itself."""
    if not GPU:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compilation, and what PyTorch makes once
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return results

    return replay


@contextmanager
def no_sync() -> Iterator[None]:
    """On a GPU, an error wherever the host would wait for it."""
    if not GPU:
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def memory_of_nan() -> Iterator[None]:
    """Memory that is not written holds NaN: PyTorch's own filling, and on a GPU freed blocks of many sizes."""
    if GPU:
        torch.cuda.empty_cache()
        sizes = [2**power for power in range(7, 27)] * 4
        blocks = [torch.full((size,), torch.nan, device="cuda") for size in sizes]
        del blocks
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def skip_unless_free(gigabytes: float) -> None:
    """Skip where the device has less free memory, and say how much it has."""
    if not GPU:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GiB of free device memory; {free:.0f} GiB are")

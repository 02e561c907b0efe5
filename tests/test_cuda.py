"""CUDA tensors: values of every kernel, and what only a GPU shows: graphs, waits, uninitialised memory, size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from common import DTYPES, LAYOUTS, LEARNED, assert_all_close, check, results
from conftest import GPU
from test_ops import calls
from torch import nn

import vcl_kernels as vk
from benchmarks.gpu.sanitized import launched

REHEARSING = os.environ.get("VCL_KERNELS_REHEARSE") == "1" and not GPU
DEVICE = "cuda" if GPU else "cpu"

pytestmark = pytest.mark.skipif(
    not GPU and not REHEARSING, reason="no CUDA device; `make gpu-check ARGS=--rehearse` runs it in the interpreter"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device; this has no rehearsal")
triton = {"backend": "triton"}
EVERY = {"form": "relative_variance"}
PER_ACTIVATION = {**EVERY, "unit": "activation"}
SPLIT_SPATIAL = {"moments_spatial", "finalise", "backward_spatial"}
SPLIT_UNIT = {"moments_unit", "finalise", "backward_unit"}


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
        captured = step()

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return captured

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


# What runs, with float16's upstream gradient before rounding it or not: shape on a GPU, shape in a rehearsal, layout,
# options, kernels.
LOSSES = {
    "on_chip_spatial": ((40, 64, 14, 14), (10, 5, 3, 3), "contiguous", EVERY, {"one_pass_spatial"}),
    "on_chip_unit": ((256, 1000), (12, 21), "contiguous", {**EVERY, "sub_batch_size": 6}, {"one_pass_unit"}),
    "per_activation": ((64, 32, 14, 14), (10, 3, 3, 4), "contiguous", PER_ACTIVATION, {"one_pass_unit"}),
    "split_spatial": ((32, 64, 56, 56), (10, 2, 41, 41), "contiguous", EVERY, SPLIT_SPATIAL),
    "split_unit": ((32, 64, 40, 40), (10, 5, 24, 24), "channels_last", EVERY, SPLIT_UNIT),
    "rows_of_a_pair_spatial": ((250, 64, 24, 24), (22, 4, 5, 5), "contiguous", {}, SPLIT_SPATIAL),
    "rows_of_a_pair_unit": ((250, 64, 24, 24), (22, 4, 5, 5), "channels_last", {}, SPLIT_UNIT),
    "every_second_row": ((23, 70, 30, 30), (23, 2, 33, 33), "row_stride", {"form": "variance"}, SPLIT_SPATIAL),
}  # fmt: skip


def sample(shape, dtype=torch.float32, layout="contiguous"):
    return LAYOUTS[layout]((2 * torch.randn(shape).to(DEVICE) + 0.5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_loss(case, dtype):
    on_gpu, rehearsed, layout, options, kernels = LOSSES[case]
    x = sample(sized(on_gpu, rehearsed), dtype, layout)
    with launched() as names:
        check(vk.vcl_loss, x, "triton", **options)
    if dtype == torch.float16 and names != kernels:  # gradients are made in backward, so that a scale comes first
        kernels = SPLIT_SPATIAL if kernels == {"one_pass_spatial"} else SPLIT_UNIT
    assert names == kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "form"), [("elu", "ratio"), ("gelu", "relative_variance"), ("tanh", "ratio")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "per_activation"])
def test_activation(name, form, dtype, layout):
    """With y and the rows of a pair saved, and with x."""
    x = sample(sized((33, 48, 28, 28), (11, 5, 5, 7)), dtype, layout.replace("per_activation", "contiguous"))
    options = {"form": form, "unit": "activation" if layout == "per_activation" else "channel", "sub_batch_size": 3}
    with launched() as names:
        check(vk.vcl_activation, x, "triton", activation=name, **options)
    assert names == (SPLIT_SPATIAL if layout == "contiguous" else SPLIT_UNIT)


@pytest.mark.parametrize("g", [1.0, 3.5])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_upstream_gradient_multiplies_what_forward_made(dtype, g):
    x = sample(sized((40, 64, 14, 14), (10, 5, 3, 3)), dtype)
    with launched() as names:
        check(vk.vcl_loss, x, "triton", g=torch.tensor(g), reduction="mean", **EVERY)
    assert names == {"one_pass_spatial", *(["multiply"] if GPU else [])}  # a CPU tensor is multiplied by PyTorch


def steps():
    """Forward and backward of each op, as (x, a function of no arguments to a list of tensors)."""
    shapes = sized(((16, 32, 14, 14), (32, 16, 56, 56), (250, 40)), ((10, 3, 4, 4), (10, 2, 41, 41), (22, 9)))
    for shape in shapes:
        for dtype in sized((torch.float32, torch.float16), (torch.float32,)):
            x, beta, one = sample(shape, dtype), torch.ones(shape[1], device=DEVICE), torch.ones((), device=DEVICE)
            for options in ({}, EVERY):
                yield x, partial(results, vk.vcl_loss, x, [2 * one], beta=beta, **options, **triton)
                options = {"activation": "elu" if not options else "gelu", **options}
                yield (
                    x,
                    partial(results, vk.vcl_activation, x, [torch.ones_like(x), one], beta=beta, **options, **triton),
                )
        ones = torch.ones(shape[0] // 5, shape[1], device=DEVICE)
        yield x, partial(results, vk.sub_batch_moments, x, [ones, ones], sub_batch_size=5, **triton)


def test_graph_capture_and_replay():
    for x, step in steps():
        run = replayed(step)
        for factor in sized((1, 2, 3), (1,)):
            x.copy_(torch.randn(x.shape).to(DEVICE) * factor)
            got = [t.clone() for t in run()]
            assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True)), (step.args[0].__name__, x.shape)
            assert all(t.isfinite().all() for t in got)


@needs_gpu
def test_a_wait_is_noticed():
    with pytest.raises(RuntimeError, match="synchroniz"), no_sync():
        torch.ones((), device=DEVICE).item()


def test_ops_do_not_wait():
    for _, step in steps():
        step()  # compilation
        with no_sync():
            step()


class Network(nn.Module):
    """Fused activations, one that is not, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.elu, self.mish, self.relu = nn.ELU(), nn.Mish(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.elu(self.a(x))
        x = self.relu(self.b(self.relu(self.b(x))) + x)
        return self.c(self.mish(x).mean((2, 3)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step_does_not_wait(dtype, inject, scaled):
    net, x = Network().to(DEVICE), torch.randn(sized((64, 3, 32, 32), (20, 3, 8, 8)), device=DEVICE)
    target = torch.randint(4, (len(x),), device=DEVICE)
    handle = vk.attach(net, x[:2], inject=inject, **LEARNED)
    optimizer = torch.optim.SGD(vk.param_groups(net, 1e-4), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=16.0) if scaled else None
    handle.grad_scaler = scaler if inject else None

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            objective = nn.functional.cross_entropy(net(x).float(), target)
        if not inject:
            objective = objective + handle.loss()
        (objective if scaler is None else scaler.scale(objective)).backward()
        if scaler is None:  # a scaler's own step waits, to see whether a gradient is not finite
            optimizer.step()
        return handle.losses

    step()
    with no_sync():
        losses = step()
    assert list(losses) == ["elu", "mish", "relu", "relu:1"]
    assert all(value.device.type == DEVICE and value.isfinite() and value > 0 for value in losses.values())
    assert all(p.grad.isfinite().all() and p.grad.any() for p in handle.parameters())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(dtype, layout):
    """Few channels and much data: sums are split over many programs."""
    x = sample(sized((64, 4, 200, 200), (10, 2, 50, 50)), dtype, layout)
    beta = torch.ones(x.shape[1], device=DEVICE)

    def run():
        upstream = [torch.ones_like(x), torch.tensor(2.0)]
        both = results(vk.vcl_activation, x, upstream, activation="silu", beta=beta, **EVERY, **triton)
        return both + results(vk.vcl_loss, x, beta=beta, **triton)

    first = run()
    for _ in range(sized(20, 1)):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_memory_that_is_not_written():
    for x, step in steps():
        expected = step()
        with memory_of_nan():
            assert torch.empty(1000, device=DEVICE).isnan().all()
            got = step()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (
            step.args[0].__name__,
            x.shape,
            x.dtype,
        )


LARGE = {  # 1.1 times 2³¹ elements: the last sub-batch lies beyond what 32 bits reach
    "contiguous": ((44, 64, 920, 920), (12, 3, 9, 9), 4),
    "channels_last": ((44, 64, 920, 920), (12, 3, 9, 9), 4),
    "2-D": ((147456, 16384), (36, 7), sized(4096, 6)),
}


@pytest.mark.parametrize("layout", LARGE)
def test_more_elements_than_32_bits_count(layout):
    """The first unit and the last are as if they were alone: a unit has nothing to do with the others."""
    skip_unless_free(45)
    on_gpu, rehearsed, n = LARGE[layout]
    x = torch.randn(sized(on_gpu, rehearsed), dtype=torch.bfloat16).to(DEVICE)
    assert not GPU or x.numel() > 1.1 * 2**31
    x = LAYOUTS["channels_last"](x) if layout == "channels_last" else x
    for k, rows in enumerate(x.split(n)):
        rows *= 1 + k / 8  # variances that differ
    settings = {**EVERY, "sub_batch_size": n, "reduction": "none"}
    ones, dy = torch.ones(x.shape[1], device=DEVICE), 1e-7  # of the size of the loss's gradient, which is then seen
    loss, of_loss = results(vk.vcl_loss, x, [ones], **settings, **triton)
    y, again, of_both = results(vk.vcl_activation, x, [torch.full_like(x, dy), ones], **settings, **triton)
    for units in (slice(0, 1), slice(-1, None)):
        part = x[:, units].double()
        exact, dx = results(vk.reference.vcl_loss, part, [ones[units]], **settings)
        upstream = [torch.full_like(part, dy), ones[units]]
        exact_y, _, both = results(vk.reference.vcl_activation, part, upstream, **settings)
        for found in (loss, again):
            torch.testing.assert_close(found[units].double(), exact, rtol=1e-3, atol=0)
        torch.testing.assert_close(y[:, units].double(), exact_y, rtol=2**-6, atol=1e-6)
        for found, wanted in ((of_loss, dx), (of_both, both)):
            least = float(1e-3 * dx.abs().max())
            torch.testing.assert_close(found[:, units].double(), wanted, rtol=2**-6, atol=least)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["functions", "module", "injected"])
def test_compiled_without_a_break(name, layout, dynamic):
    """In a rehearsal without code generation, and on the backend of CPU tensors."""
    module = vk.VCLActivation("elu", 6, sub_batch_size=4, inject=name == "injected", **LEARNED).to(DEVICE)
    inputs = [torch.randn(5).to(DEVICE).requires_grad_(), module.beta]

    def step(x):
        if name != "functions":
            return module(x * inputs[0]).square().mean() + (0 if module.inject else module.loss)
        y, loss = vk.vcl_activation(x * inputs[0], "elu", inputs[1], sub_batch_size=4)
        return y.square().mean() + 2 * loss + 0.3 * vk.vcl_loss(y.tanh(), form="variance", sub_batch_size=4)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="inductor" if GPU else "aot_eager")
    for rows in (12, 24, 40):
        x = sample((rows, 6, 4, 5), layout=layout)
        assert_all_close(*(torch.autograd.grad(f(x), inputs) for f in (compiled, step)), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(vk.backends()["cpu"] != "available" and not GPU, reason="the ops have no kernels for CPU tensors")
def test_ops_as_registered():
    """Schemas and fake results against those of the device's own kernels."""
    ops = torch.ops.vcl_kernels
    for x in (sample((16, 5, 3, 4)), sample((16, 5, 3, 4), layout="channels_last"), sample((16, 7), torch.bfloat16)):
        for name, arguments in calls(ops, x, False):
            torch.library.opcheck(getattr(ops, name).default, arguments)


@needs_gpu
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(20, 8, 9, device="cuda:1")
    with torch.cuda.device(0):
        found = results(vk.vcl_loss, x, **EVERY)
    assert_all_close(found, results(vk.reference.vcl_loss, x, **EVERY))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the paper's 2x2 kernels
@pytest.mark.parametrize("method", ["none", "bn", "vcl"])
def test_a_training_on_the_device_continues_from_its_checkpoint(tmp_path, method):
    for package in ("matplotlib", "rich"):  # what the benchmarks' reports are made with
        pytest.importorskip(package)
    from benchmarks.accuracy.cifar import files, machine, runs, training
    from benchmarks.accuracy.data import Data

    x, y = torch.randn(500, 3, 32, 32).to(DEVICE), torch.randint(10, (500,)).to(DEVICE)
    data, device = Data(x, y, x[:100], y[:100], 10), torch.device(DEVICE)
    run = runs.Run("gpu", "cifar10", method, 0, 0.05, epochs=2, k=0.05)
    store = files.Store(tmp_path, tmp_path)
    for done in (0, 1):
        one = training.Training(run, data, dtype=machine.dtype(device), device=device)
        store.resume(one)
        assert one.done == done
        one.epoch()
        store.save(one)
    assert one.finished
    assert not one.record["diverged"]
    assert one.record["resumed_after_epochs"] == [1]
    assert one.record["machine"]["kind"] == machine.kind(device)
    assert one.record["epochs"]["train_loss"][1] < 3

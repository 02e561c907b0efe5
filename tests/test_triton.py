"""What the Triton kernels read and write, counted in the interpreter, and how launches are decided."""

import math

import pytest
import torch
from conftest import GPU

import vcl_kernels as vk
from vcl_kernels.backends.triton import launch as launching
from vcl_kernels.spec import ACTIVATIONS, FORMS, NO_MINIMUM, Activation, LossSpec

pytestmark = pytest.mark.skipif(GPU, reason="counts come from the interpreter; a GPU runs the kernels themselves")


@pytest.fixture
def traffic(monkeypatch):
    """A list of (read or write, address array) of every access."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, ptrs, mask, *rest):
        seen.append(("read", ptrs.data[mask.data]))
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        seen.append(("write", ptrs.data[mask.data]))
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return seen


def count(seen, kind, tensor):
    start = tensor.data_ptr()
    stop = start + tensor.numel() * tensor.element_size()
    return sum(int(((at >= start) & (at < stop)).sum()) for k, at in seen if k == kind)


@pytest.mark.parametrize("shape", [(22, 6, 7, 7), (40, 70), (11, 5, 9, 9), (21, 4, 30)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_loss_and_gradient_in_one_pass(traffic, shape, channels_last):
    x = torch.randn(shape)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    loss = vk.vcl_loss(x, form="relative_variance", sub_batch_size=5, backend="triton")
    (dx,) = torch.autograd.grad(loss, x)
    taking_part = x.numel() // shape[0] * (shape[0] // 5 * 5)
    assert taking_part <= count(traffic, "read", x) <= 1.05 * taking_part
    assert x.numel() <= count(traffic, "write", dx) <= 1.05 * x.numel()
    total = sum(at.size for _, at in traffic)
    assert total <= 1.05 * (taking_part + x.numel()) + 4 * math.prod(shape[1:])


def test_pair_reads_its_rows_only(traffic):
    x = torch.randn(64, 6, 20, requires_grad=True)
    loss = vk.vcl_loss(x, backend="triton")
    (dx,) = torch.autograd.grad(loss, x)
    reads = sum(at.size for kind, at in traffic if kind == "read")
    assert reads < 3 * 10 * 6 * 20
    assert count(traffic, "write", dx) == x.numel()


def activation_there_and_back(x, form, name, keep_rows):
    """Forward and backward of an activation with its loss; return y, dy, dx, and the elements of the kept rows."""
    from vcl_kernels.backends.triton import launchers

    n, chosen = 5, Activation(ACTIVATIONS.index(name), 1.0)
    K = 2 if form == "ratio" else x.shape[0] // n
    given = LossSpec(1.0, NO_MINIMUM, n, K, FORMS.index(form), False, 1.0, True)
    y, loss, mean, scale, _, rows = launchers.activation(x, None, *given, False, *chosen, keep_rows)
    dy, kept = torch.ones_like(x), rows if keep_rows else None
    of_loss = mean, scale, torch.ones_like(loss), n, x.shape[0], False
    dx = launchers.activation_dx(y if keep_rows else x, keep_rows, kept, dy, *of_loss, *chosen)
    return y, dy, dx, rows.numel()


# (64, 6, 28, 28): the coefficients and partial moments are as small beside a channel's values as in a real network
@pytest.mark.parametrize("channels_last", [False, True])
def test_activation_of_a_pair_costs_its_rows(traffic, channels_last):
    x = torch.randn(250, 6, 28, 28)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    y, dy, dx, kept = activation_there_and_back(x, "ratio", "elu", keep_rows=True)
    E = x.numel()
    assert kept == 10 * 6 * 28 * 28
    assert E <= count(traffic, "read", x) <= 1.001 * E  # pilots are read twice
    assert count(traffic, "read", y) == count(traffic, "read", dy) == E
    assert count(traffic, "write", y) == count(traffic, "write", dx) == E
    reads = sum(at.size for kind, at in traffic if kind == "read")
    writes = sum(at.size for kind, at in traffic if kind == "write")
    assert reads + writes <= 1.01 * 5 * E + 2 * kept


@pytest.mark.parametrize("channels_last", [False, True])
def test_activation_of_all_sub_batches_reads_three_tensors(traffic, channels_last):
    x = torch.randn(64, 6, 28, 28)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    y, _, dx, _ = activation_there_and_back(x, "relative_variance", "gelu", keep_rows=False)
    E = x.numel()
    assert count(traffic, "read", y) == 0
    assert count(traffic, "write", y) == count(traffic, "write", dx) == E
    assert sum(at.size for _, at in traffic) <= 1.03 * 5 * E


@pytest.mark.parametrize("U", [3, 1024, 1025])
@pytest.mark.parametrize("scalar", [False, True])
def test_sum_over_units_needs_no_launch_of_its_own(traffic, U, scalar):
    from vcl_kernels.backends.triton import launchers

    x = torch.randn(10, U, dtype=torch.float64)
    beta = torch.rand(() if scalar else U, dtype=torch.float64)
    results = []
    for reduce in (False, True):
        given = LossSpec(0.0, NO_MINIMUM, 5, 2, 0, False, 1.0, reduce)
        results.append(launchers.loss_coefficients(x, beta, *given, True))
    each, reduced = results
    assert reduced[0].shape == ()
    assert torch.allclose(reduced[0], each[0].sum(), rtol=1e-12)
    assert torch.allclose(reduced[3], each[3].sum() if scalar else each[3], rtol=1e-12)
    assert count(traffic, "write", reduced[0]) == (U <= 1024)  # else PyTorch adds the units


def test_upstream_of_one_leaves_dx_alone(traffic):
    from vcl_kernels.backends.triton.launchers import multiply_

    dx = torch.randn(5000)
    kept = dx.clone()
    multiply_(dx, torch.tensor(1.0))
    assert count(traffic, "read", dx) == count(traffic, "write", dx) == 0
    multiply_(dx, torch.tensor(0.5))
    assert torch.equal(dx, kept / 2)


def test_changing_positions_share_a_kernel_in_the_end(monkeypatch):
    monkeypatch.setattr(launching, "_constant_positions", set())
    constants = [launching.positions_constant(P) for P in range(100, 160)]
    assert constants[0] == 100
    assert set(constants[20:]) == {0}
    assert launching.positions_constant(100) == 100


def test_run_time_positions_give_the_same(monkeypatch):
    x = torch.randn(20, 3, 9, 11, requires_grad=True)
    results = []
    for seen in (set(), set(range(-16, 0))):
        monkeypatch.setattr(launching, "_constant_positions", seen)
        for options in ({}, {"form": "variance"}):
            loss = vk.vcl_loss(x, backend="triton", **options)
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for constant, run_time in zip(results[:2], results[2:], strict=True):
        assert torch.equal(constant[0], run_time[0])
        assert torch.equal(constant[1], run_time[1])

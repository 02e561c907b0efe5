"""Identities of the mathematics, and hypothesis over shapes, sub-batches, strides and offsets."""

import pytest
import torch
from conftest import device_of

import vcl_kernels as vk

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

shapes = st.tuples(st.integers(4, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(shape=shapes, n=st.integers(2, 6), form=st.sampled_from(["ratio", "variance", "relative_variance"]),
                  unit=st.sampled_from(["channel", "activation"]), steps=st.tuples(*[st.integers(1, 2)] * 4),
                  order=st.permutations(range(4)), offset=st.integers(0, 3))  # fmt: skip
def test_any_strides_give_the_reference(shape, n, form, unit, steps, order, offset):
    n = min(n, shape[0] // 2)
    torch.manual_seed(shape[1])
    big = [s * step for s, step in zip(shape, steps, strict=True)]
    memory = torch.randn(offset + torch.Size(big).numel(), dtype=torch.float64)[offset:]
    inverse = sorted(range(4), key=order.__getitem__)
    x = memory.view([big[i] for i in order]).permute(inverse)[tuple(slice(None, None, step) for step in steps)]
    a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
    options = {"sub_batch_size": n, "form": form, "unit": unit}
    got = vk.vcl_loss(a, backend="cpu", **options)
    expected = vk.reference.vcl_loss(b, **options)
    torch.testing.assert_close(got, expected)
    (dx,), (dx_expected,) = torch.autograd.grad(got, a), torch.autograd.grad(expected, b)
    torch.testing.assert_close(dx, dx_expected)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(20, 6, 9, dtype=torch.float64)


def test_shift_and_scale(backend, x):
    x = x.to(device_of(backend))
    loss = vk.vcl_loss(x, 0.0, backend=backend)
    torch.testing.assert_close(vk.vcl_loss(x + 3, 0.0, backend=backend), loss)
    torch.testing.assert_close(vk.vcl_loss(x * 7, 0.0, backend=backend), loss)


def test_order_within_a_sub_batch_and_of_channels(kernel_backend, x):
    x = x.to(device_of(kernel_backend))
    loss = vk.vcl_loss(x, form="variance", backend=kernel_backend, reduction="none")
    shuffled = torch.cat([part[torch.randperm(5)] for part in x.split(5)])
    torch.testing.assert_close(vk.vcl_loss(shuffled, form="variance", backend=kernel_backend, reduction="none"), loss)
    order = torch.randperm(6)
    got = vk.vcl_loss(x[:, order], form="variance", backend=kernel_backend, reduction="none")
    torch.testing.assert_close(got, loss[order])


def test_closed_form_of_the_ratio():
    """Gaussian, beta = 0: r follows F(d, d), so E[(1-r)²] = 1 - 2d/(d-2) + d(d+2)/((d-2)(d-4)), d = M - 1."""
    torch.manual_seed(1)
    n, d = 21, 20
    per_unit = vk.vcl_loss(torch.randn(2 * n, 200_000), 0.0, sub_batch_size=n, reduction="none")
    expected = 1 - 2 * d / (d - 2) + d * (d + 2) / ((d - 2) * (d - 4))
    assert abs(per_unit.mean() - expected) < 4 * per_unit.std() / len(per_unit) ** 0.5


def test_closed_form_of_the_variance_of_the_variance():
    """Var(s²) = σ⁴ (κ/M - (M-3)/(M(M-1))), for a uniform distribution with κ = 1.8."""
    torch.manual_seed(2)
    M = 12
    per_unit = vk.vcl_loss(torch.rand(8 * M, 100_000), form="variance", sub_batch_size=M, reduction="none")
    expected = (1 / 12) ** 2 * (1.8 / M - (M - 3) / (M * (M - 1)))
    assert abs(per_unit.mean() - expected) < 4 * per_unit.std() / len(per_unit) ** 0.5


def test_sub_batch_moments(backend, x):
    x = x.to(device_of(backend))
    mean, var = vk.sub_batch_moments(x, 5, backend=backend)
    torch.testing.assert_close(mean[1], x[5:10].mean((0, 2)))
    torch.testing.assert_close(var[3], x[15:].transpose(0, 1).flatten(1).var(1))
    mean, var = vk.sub_batch_moments(x, 5, unit="activation", num_sub_batches=2, backend=backend)
    assert mean.shape == var.shape == (2, 6, 9)
    torch.testing.assert_close(var[1], x[5:10].var(0))

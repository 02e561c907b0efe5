"""Laws of the mathematics, and hypothesis over shapes, sub-batches, strides and offsets."""

import pytest
import torch
from common import assert_all_close, results
from conftest import device_of

import vcl_kernels as vk
from vcl_kernels.options import FORMS, UNITS

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

shapes = st.tuples(st.integers(4, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(shape=shapes, n=st.integers(2, 6), form=st.sampled_from(FORMS), unit=st.sampled_from(UNITS),
                  steps=st.tuples(*[st.integers(1, 2)] * 4), order=st.permutations(range(4)),
                  offset=st.integers(0, 3))  # fmt: skip
def test_any_strides_give_the_reference(shape, n, form, unit, steps, order, offset):
    big = [size * step for size, step in zip(shape, steps, strict=True)]
    generator = torch.Generator().manual_seed(0)  # the same values when hypothesis tries an example once more
    memory = torch.randn(offset + torch.Size(big).numel(), dtype=torch.float64, generator=generator)[offset:]
    inverse = sorted(range(4), key=order.__getitem__)
    x = memory.view([big[i] for i in order]).permute(inverse)[tuple(slice(None, None, step) for step in steps)]
    options = {"sub_batch_size": min(n, shape[0] // 2), "form": form, "unit": unit}
    assert_all_close(results(vk.vcl_loss, x, backend="cpu", **options), results(vk.reference.vcl_loss, x, **options))


@pytest.fixture
def x():
    return torch.randn(20, 6, 9, dtype=torch.float64)


def test_shift_and_scale(backend, x):
    x = x.to(device_of(backend))
    loss = vk.vcl_loss(x, 0.0, backend=backend)
    torch.testing.assert_close(vk.vcl_loss(x + 3, 0.0, backend=backend), loss)
    torch.testing.assert_close(vk.vcl_loss(x * 7, 0.0, backend=backend), loss)


def test_order_within_a_sub_batch_and_of_channels(kernel_backend, x):
    def loss(x):
        x = x.to(device_of(kernel_backend))
        return vk.vcl_loss(x, form="variance", reduction="none", backend=kernel_backend)

    shuffled = torch.cat([part[torch.randperm(5)] for part in x.split(5)])
    torch.testing.assert_close(loss(shuffled), loss(x))
    order = torch.randperm(6)
    torch.testing.assert_close(loss(x[:, order]), loss(x)[order])


def assert_mean(per_unit, expected):
    """Within 4 standard errors."""
    assert abs(per_unit.mean() - expected) < 4 * per_unit.std() / len(per_unit) ** 0.5


def test_closed_form_of_the_ratio():
    """Gaussian, beta = 0: r follows F(d, d), so E[(1-r)²] = 1 - 2d/(d-2) + d(d+2)/((d-2)(d-4)), d = M - 1."""
    n, d = 21, 20
    per_unit = vk.vcl_loss(torch.randn(2 * n, 200_000), 0.0, sub_batch_size=n, reduction="none")
    assert_mean(per_unit, 1 - 2 * d / (d - 2) + d * (d + 2) / ((d - 2) * (d - 4)))


def test_closed_form_of_the_variance_of_the_variance():
    """Var(s²) = σ⁴ (κ/M - (M-3)/(M(M-1))), for a uniform distribution with κ = 1.8."""
    M = 12
    per_unit = vk.vcl_loss(torch.rand(8 * M, 100_000), form="variance", sub_batch_size=M, reduction="none")
    assert_mean(per_unit, (1 / 12) ** 2 * (1.8 / M - (M - 3) / (M * (M - 1))))

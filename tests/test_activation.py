"""vcl_activation: every activation and dtype, and memory beside the bare activation; for layouts see test_loss."""

import math

import pytest
import torch
from common import DTYPES, LAYOUTS, assert_all_close, check, named, results
from conftest import device_of

import vcl_kernels as vk
from vcl_kernels.options import ACTIVATIONS

MODES = {
    "pair": {"sub_batch_size": 4},  # y is saved, with the rows of one pair, where the derivative follows from it
    "all": {"sub_batch_size": 7, "form": "relative_variance"},  # x is saved
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtypes(kernel_backend, name, dtype, mode):
    x = (2 * torch.randn(21, 5, 7, 3).to(device_of(kernel_backend)) - 0.3).to(dtype)
    for layout in ("contiguous", "channels_last"):
        if layout == "channels_last" and name == "identity":
            continue  # y is x: its gradient has the layout of dy
        check(vk.vcl_activation, LAYOUTS[layout](x), kernel_backend, **named(name), **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "elu", "alpha": 0.3},
        {"activation": "leaky_relu", "negative_slope": 0.2},
        {"activation": "leaky_relu", "negative_slope": -0.2},
    ],
    ids=str,
)
def test_parameters_of_activations(kernel_backend, options, mode):
    x = torch.randn(20, 5, 6).to(device_of(kernel_backend))
    check(vk.vcl_activation, x, kernel_backend, **options, **MODES[mode])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(11, 2, 41, 41), (11, 20, 9, 9), (11, 300)], ids=str)
def test_several_tiles(kernel_backend, shape, layout):
    x = LAYOUTS[layout](torch.randn(shape).to(device_of(kernel_backend)))
    check(vk.vcl_activation, x, kernel_backend, sub_batch_size=3)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((27, 256, 28, 28), torch.float32),
        ((43, 128, 40, 40), torch.bfloat16),
        ((42, 512, 14, 14), torch.float32),  # units that do not end on a vector
        ((42, 1024, 14, 14), torch.bfloat16),
        ((250, 20000), torch.float32),
    ],
)
def test_large_enough_to_stream(shape, dtype):
    x = torch.randn(shape).to(dtype)
    assert x.numel() * x.element_size() >= 16 << 20
    every = {"form": "relative_variance", "sub_batch_size": 8}
    check(vk.vcl_activation, x, "cpu", activation="elu", **every)
    check(vk.vcl_activation, x, "cpu", activation="leaky_relu")
    check(vk.vcl_loss, x, "cpu", **every)


PARTS = {  # of what is differentiated: its upstream gradients are expanded, or there is one alone
    "y": lambda y, _: y.sum(),
    "loss": lambda _, loss: loss,
    "both": lambda y, loss: y.mean() + 0.3 * loss,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["elu", "gelu"])
def test_one_upstream_alone_or_expanded(backend, name, mode, part):
    x = torch.randn(20, 4, 6).to(device_of(backend))
    _, found = results(lambda x: PARTS[part](*vk.vcl_activation(x, name, **MODES[mode], backend=backend)), x)
    _, wanted = results(lambda x: PARTS[part](*vk.reference.vcl_activation(x, name, **MODES[mode])), x)
    torch.testing.assert_close(found, wanted)


def test_only_beta_or_nothing_wants_a_gradient(kernel_backend):
    x = torch.randn(20, 4, 6).to(device_of(kernel_backend))
    beta = torch.ones(4, device=x.device, requires_grad=True)
    y, loss = vk.vcl_activation(x, "elu", beta, backend=kernel_backend)
    torch.testing.assert_close(y, torch.nn.functional.elu(x))
    wanted = vk.reference.vcl_loss(x, beta)
    assert_all_close(torch.autograd.grad(loss, beta), torch.autograd.grad(wanted, beta))
    y, loss = vk.vcl_activation(x, "elu", backend=kernel_backend)
    assert not y.requires_grad
    assert not loss.requires_grad


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_not_finite_values_propagate(kernel_backend, name):
    """Through the activation as in PyTorch; through the loss to the unit's rows that take part, and no further."""
    x = torch.randn(12, 6, 5).to(device_of(kernel_backend))
    x[0, 0, 0], x[1, 1, 1], x[11, 2, 2], x[11, 3, 3] = torch.nan, torch.inf, -torch.inf, torch.nan
    upstream = [torch.ones(x.shape), torch.ones(6)]
    y, loss, dx = results(vk.vcl_activation, x, upstream, **named(name), backend=kernel_backend, reduction="none")
    exact, _ = vk.reference.vcl_activation(x.double(), **named(name))
    torch.testing.assert_close(y, exact.float(), equal_nan=True)
    assert loss.isfinite().tolist() == [False, False, True, True, True, True]
    assert dx[:10, :2].isnan().all()
    assert dx[:10, 2:].isfinite().all()


def of_y(x, dy, backend, **options):
    """y and its gradient, and those of eager PyTorch."""
    found = results(lambda x: vk.vcl_activation(x, **options, backend=backend)[0], x, [dy])
    return found, results(lambda x: vk.reference.vcl_activation(x, **options)[0], x, [dy])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_values_as_in_eager_pytorch(kernel_backend, name, dtype, mode):
    """Where a written-out exponential ends, and a NaN that is not the usual one."""
    far = [1e30, 1e20, 1e13, 1e4, 100.0, 88.75, 88.7228394, 88.7228317, 88.5, 87.5, 20.0, 9.0, 1e-3, 1e-37, 0.0]
    odd = torch.tensor([*far, *(-v for v in far), torch.inf, -torch.inf, torch.nan])
    odd = torch.cat([odd, torch.tensor([0x7FC00301, -0x3FFCFF]).int().view(torch.float32)])
    x = odd.expand(14, -1).to(dtype).to(device_of(kernel_backend)).contiguous()
    options = {**named(name), **MODES[mode]}
    found, eager = of_y(x, torch.ones(x.shape), kernel_backend, **options)
    few_ulp = 8 * torch.finfo(dtype).eps
    for got, want in zip(found, eager, strict=True):
        same = torch.isclose(got, want, rtol=few_ulp, atol=few_ulp, equal_nan=True)
        own_overflow, only_in_vector_code = want.isnan() & ~x.isnan(), got.isnan() & x.isnan()
        assert (same | own_overflow | only_in_vector_code).all(), (x[~same], got[~same], want[~same])
    assert found[0][x.isnan()].isnan().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_upstream_gradient_that_is_not_finite(kernel_backend, name):
    x = torch.randn(11, 5, 9).to(device_of(kernel_backend))
    dy = torch.ones(x.shape)
    dy[:, 2], dy[:, 3] = torch.nan, torch.inf
    found, eager = of_y(x, dy, kernel_backend, **named(name))
    assert_all_close(found, eager, equal_nan=True)
    assert found[1][:, 2][x[:, 2] > 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["elu", "tanh"])
def test_digits_are_kept_near_zero(kernel_backend, name, dtype):
    about = torch.finfo(dtype)
    size = torch.logspace(max(-30, math.log10(about.tiny)), 2, 3000, dtype=torch.float64)
    x = torch.cat([size, -size]).view(10, -1).to(device_of(kernel_backend), dtype)
    exact, _ = vk.reference.vcl_activation(x.double(), name, alpha=1.3)
    y, _ = vk.vcl_activation(x, name, alpha=1.3, backend=kernel_backend)
    roundings = 1.01 if about.bits == 16 else 4  # in half precision little but the last, which the interpreter cuts off
    assert ((y.double() - exact) / exact).abs().max() < roundings * about.eps


def test_the_identity_of_the_reference_is_x_itself():
    x = torch.randn(14, 4, requires_grad=True)
    assert vk.vcl_activation(x, "identity", backend="reference")[0] is x


def test_autocast():
    conv, x = torch.nn.Conv2d(3, 6, 3), torch.randn(20, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, loss = vk.vcl_activation(conv(x), "elu")
    assert (y.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    (y.sum() + loss).backward()
    assert conv.weight.grad.isfinite().all()

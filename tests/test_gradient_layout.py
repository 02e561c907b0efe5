"""A gradient has x's memory format, on every backend, whatever the upstream gradient's is."""

from itertools import product

import pytest
import torch
from common import LAYOUTS
from conftest import device_of

import vcl_kernels as vk
from vcl_kernels.options import UNITS


def moments(x, sub_batch_size=5, **options):
    options.pop("form", None)
    return vk.sub_batch_moments(x, sub_batch_size, **options)


FUNCTIONS = {"loss": vk.vcl_loss, "activation": vk.vcl_activation, "moments": moments}
DENSE = {  # their shapes, and the order of their dimensions in memory
    "contiguous": ((14, 4, 3, 2), (0, 1, 2, 3)),
    "channels_last": ((14, 4, 3, 2), (0, 2, 3, 1)),
    "channels_last_3d": ((14, 4, 3, 2, 2), (0, 2, 3, 4, 1)),
    "transposed": ((14, 4, 3, 2), (0, 3, 2, 1)),
    "channels_last_1d": ((14, 4, 3), (0, 2, 1)),
}
OPTIONS = ({}, {"form": "relative_variance", "sub_batch_size": 4}, {"form": "variance", "sub_batch_size": 7})


def gradient(function, x, dy=None, **options):
    x = x.detach().requires_grad_()
    results = function(x, **options)
    results = list(results) if isinstance(results, tuple) else [results]
    upstream = [torch.ones_like(t) if dy is None or t.shape != x.shape else dy for t in results]
    return torch.autograd.grad(results, x, upstream)[0]


def laid_out(layout, backend, dtype):
    shape, order = DENSE[layout]
    x = torch.randn([shape[d] for d in order]).to(device_of(backend), dtype)
    return x.permute([order.index(d) for d in range(len(shape))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dense_layouts(backend, name, layout, dtype):
    x = laid_out(layout, backend, dtype)
    upstream = (None, torch.randn(x.shape).to(x)) if name == "activation" else (None,)  # the second is contiguous
    for options, unit, dy in product(OPTIONS, UNITS if backend != "triton" else UNITS[:1], upstream):
        dx = gradient(FUNCTIONS[name], x, dy, backend=backend, unit=unit, **options)
        assert dx.stride() == x.stride()
        assert dx.dtype == dtype


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slices_without_their_gaps(backend, name):
    x = torch.randn(14, 6, 5, 4).to(device_of(backend))
    dx = gradient(FUNCTIONS[name], LAYOUTS["channels_last_slice"](x), backend=backend)
    assert dx.stride() == (120, 1, 24, 6)
    assert gradient(FUNCTIONS[name], LAYOUTS["channel_slice"](x), backend=backend).is_contiguous()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_reference(name):
    x = laid_out("channels_last", "reference", torch.float32)
    function = {
        "loss": vk.reference.vcl_loss,
        "activation": vk.reference.vcl_activation,
        "moments": lambda x: vk.reference.sub_batch_moments(x, 5),
    }[name]
    assert gradient(function, x).stride() == x.stride()
    exact = gradient(FUNCTIONS[name], x.contiguous().double(), backend="reference")
    torch.testing.assert_close(gradient(function, x), exact.float())
    assert torch.autograd.gradgradcheck(function, x[:, :2, :2, :1].double().requires_grad_(), fast_mode=True)


def test_the_identity_of_the_reference_is_x_itself():
    x = laid_out("channels_last", "reference", torch.float32).requires_grad_()
    y, _ = vk.vcl_activation(x, "identity", backend="reference")
    assert y is x

"""Numerical derivatives in float64, first and second, of every form, unit, layout and backend; and graphs of them."""

import pytest
import torch
from common import LAYOUTS, assert_all_close, named
from conftest import device_of
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk
from vcl_kernels.options import ACTIVATIONS, FORMS, UNITS

CASES = {  # shape of x, and how it is cut
    "contiguous": ((7, 2, 2), {"sub_batch_size": 3}),
    "2d": ((7, 3), {"sub_batch_size": 3}),
    "channels_last": ((6, 2, 1, 2), {"sub_batch_size": 3}),
    "rows_of_a_pair": ((8, 2, 2), {"sub_batch_size": 2, "num_sub_batches": 2}),
}


def inputs_of(backend, form, unit, case):
    """x, and a beta for each unit if the form has one."""
    shape, _ = CASES[case]
    x = torch.randn(shape, dtype=torch.float64)
    x = LAYOUTS.get(case, LAYOUTS["contiguous"])(x).to(device_of(backend)).requires_grad_()
    if form == "variance":
        return (x,)
    units = shape[1:2] if unit == "channel" else shape[1:]
    return x, (torch.rand(units, dtype=torch.float64) + 0.5).to(x.device).requires_grad_()


def check_derivatives(backend, function, inputs):
    """First and second derivatives; in the slow interpreter each in one direction."""
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
def test_loss(backend, form, unit, case):
    options = {"form": form, "unit": unit, "reduction": "none", "backend": backend, **CASES[case][1]}
    inputs = inputs_of(backend, form, unit, case)
    check_derivatives(backend, lambda x, beta=None: vk.vcl_loss(x, beta, **options), inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unit", UNITS)
def test_sub_batch_moments(backend, unit, case):
    def moments(x):
        return vk.sub_batch_moments(x, **CASES[case][1], unit=unit, backend=backend)

    (x,) = inputs_of(backend, "variance", unit, case)
    check_derivatives(backend, moments, (x,))
    for one in (0, 1):  # the other has no upstream gradient
        assert torch.autograd.gradcheck(lambda x, one=one: moments(x)[one], (x,), fast_mode=backend == "triton")


def test_beta_alone(kernel_backend):
    x, beta = inputs_of(kernel_backend, "ratio", "channel", "contiguous")
    x = x.detach()
    assert torch.autograd.gradcheck(lambda b: vk.vcl_loss(x, b, sub_batch_size=3, backend=kernel_backend), (beta,))


@pytest.mark.parametrize("options", [{"sub_batch_size": 2}, {"form": "relative_variance", "sub_batch_size": 3}])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(backend, name, options):
    """With y and the rows of a pair saved, and with x; values of first derivatives are in test_activation too."""
    x, beta = inputs_of(backend, "ratio", "channel", "rows_of_a_pair")

    def both(x, beta):
        return vk.vcl_activation(x, beta=beta, alpha=0.7, backend=backend, **named(name), **options)

    check_derivatives(backend, both, (x, beta))


PENALISED = {  # a scalar whose gradient is penalised
    "pair": lambda x, **to: vk.vcl_loss(x, sub_batch_size=3, **to),
    "all": lambda x, **to: vk.vcl_loss(x, sub_batch_size=3, form="relative_variance", **to),
    **{  # nobody asks for the loss: as through the bare activation, 0 of relu
        name: lambda x, name=name, **to: vk.vcl_activation(x, name, sub_batch_size=3, **to)[0].sum()
        for name in ("relu", "leaky_relu", "elu", "tanh")
    },
}


@pytest.mark.parametrize("name", PENALISED)
def test_gradient_penalty_reaches_the_weights(kernel_backend, name):
    """The second derivative as users take it: through a layer before the function."""
    w, data = (torch.randn(n, 4, dtype=torch.float64).to(device_of(kernel_backend)) for n in (4, 14))
    w.requires_grad_()

    def penalty(backend):
        x = data @ w
        (dx,) = torch.autograd.grad(PENALISED[name](x, backend=backend), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), w)[0]

    torch.testing.assert_close(penalty(kernel_backend), penalty("reference"))


LOSSES = {
    "one pass": lambda x, beta=None, **to: vk.vcl_loss(x, beta, sub_batch_size=3, **to),
    "rows of a pair": lambda x, beta=None, **to: vk.vcl_loss(
        torch.cat([x, x]), beta, sub_batch_size=3, num_sub_batches=2, **to
    ),
    "activation": lambda x, beta=None, **to: vk.vcl_activation(x, "elu", beta, sub_batch_size=3, **to)[1],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of ops without batching rules
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_several_upstream_gradients_at_once(name, form, reduction):
    inputs = inputs_of("cpu", form, "channel", "contiguous")
    options = {"form": form, "reduction": reduction}
    one, many = (LOSSES[name](*inputs, **options, backend=backend) for backend in ("reference", "cpu"))
    g = torch.randn(4, *one.shape, dtype=one.dtype)
    wanted = zip(*(torch.autograd.grad(one, inputs, k, retain_graph=True) for k in g), strict=True)
    wanted = [torch.stack(each) for each in wanted]
    assert_all_close(torch.autograd.grad(many, inputs, g, is_grads_batched=True, retain_graph=True), wanted)
    assert_all_close(torch.vmap(lambda g: torch.autograd.grad(many, inputs, g, retain_graph=True))(g), wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_that_is_traced(name):
    """Its upstream gradient of 1 is no constant: the graph is right for others too."""
    inputs = inputs_of("cpu", "ratio", "channel", "contiguous")
    backward = make_fx(lambda g: torch.autograd.grad(LOSSES[name](*inputs), inputs, g))(inputs[0].new_ones(()))
    for upstream in (1.0, 2.5):
        g = inputs[0].new_tensor(upstream)
        wanted = torch.autograd.grad(LOSSES[name](*inputs, backend="reference"), inputs, g)
        assert_all_close(backward(g), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_counts_the_loss_once(use_reentrant):
    def loss(x):
        return vk.vcl_loss(x * 2, form="variance")

    x = torch.randn(20, 6, 4, requires_grad=True)
    wanted = torch.autograd.grad(loss(x), x)
    checkpoint(loss, x, use_reentrant=use_reentrant).backward()
    assert_all_close([x.grad], wanted)

"""Numerical derivatives, first and second, of every form, unit, layout and backend, in float64."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from common import LAYOUTS
from conftest import FORMS, UNITS, device_of
from torch.fx.experimental.proxy_tensor import make_fx

import vcl_kernels as vk

SMALL = {"contiguous": (7, 2, 2), "2d": (7, 3), "channels_last": (6, 2, 1, 2)}


def case(backend, form, unit, layout, n=3):
    torch.manual_seed(0)
    shape = SMALL[layout]
    x = torch.randn(shape, dtype=torch.float64)
    x = LAYOUTS.get(layout, LAYOUTS["contiguous"])(x).to(device_of(backend)).requires_grad_()
    if form == "variance":
        return (x,)
    units = shape[1:2] if unit == "channel" else shape[1:]
    return x, (torch.rand(units, dtype=torch.float64, device=x.device) + 0.5).requires_grad_()


def check_derivatives(backend, function, inputs):
    """First and second derivatives; of the second, which is the reference's, in the slow interpreter a direction."""
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", FORMS)
def test_loss(backend, form, unit, layout):
    inputs = case(backend, form, unit, layout)

    def loss(x, beta=None):
        return vk.vcl_loss(x, beta, sub_batch_size=3, form=form, unit=unit, reduction="none", backend=backend)

    check_derivatives(backend, loss, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_loss_of_few_rows_of_many(backend, form):
    """Two sub-batches of a batch twice as large: only their rows are kept."""
    torch.manual_seed(1)
    x = torch.randn(8, 2, 2, dtype=torch.float64, device=device_of(backend), requires_grad=True)

    def loss(x):
        return vk.vcl_loss(x, sub_batch_size=2, form=form, num_sub_batches=2, backend=backend)

    check_derivatives(backend, loss, (x,))


@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("unit", UNITS)
def test_sub_batch_moments(backend, unit, layout):
    (x,) = case(backend, "variance", unit, layout)

    def moments(x):
        return vk.sub_batch_moments(x, 3, unit=unit, backend=backend)

    check_derivatives(backend, moments, (x,))
    for chosen in (0, 1):  # with no gradient of the other
        assert torch.autograd.gradcheck(lambda x, c=chosen: moments(x)[c], (x,), fast_mode=backend == "triton")


def test_beta_alone(kernel_backend):
    x, beta = case(kernel_backend, "ratio", "channel", "contiguous")
    x = x.detach()
    assert torch.autograd.gradcheck(lambda b: vk.vcl_loss(x, b, sub_batch_size=3, backend=kernel_backend), (beta,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of eager PyTorch itself
def test_forward_mode_is_refused_by_kernels_and_not_by_the_reference(kernel_backend):
    x = torch.randn(14, 4, dtype=torch.float64, device=device_of(kernel_backend))
    direction = torch.randn_like(x)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, direction)
        for call in (vk.vcl_loss, vk.vcl_activation, lambda x, backend: vk.sub_batch_moments(x, 3, backend=backend)):
            with pytest.raises(RuntimeError, match="forward"):
                call(dual, backend=kernel_backend)
        slope = fwAD.unpack_dual(vk.vcl_loss(dual, backend="reference")).tangent
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(vk.vcl_loss(leaf, backend=kernel_backend), leaf)
    torch.testing.assert_close(slope, (dx * direction).sum())


def test_gradient_penalty_reaches_the_weights(kernel_backend):
    """The second derivative as users take it: through a layer, with the loss in the middle of the graph."""
    for options in ({"sub_batch_size": 3}, {"sub_batch_size": 3, "form": "relative_variance"}):
        torch.manual_seed(2)
        device = device_of(kernel_backend)
        w = torch.randn(4, 4, dtype=torch.float64, device=device, requires_grad=True)
        data = torch.randn(14, 4, dtype=torch.float64, device=device)

        def penalty(backend, w=w, data=data, options=options):
            x = data @ w
            (dx,) = torch.autograd.grad(vk.vcl_loss(x, backend=backend, **options), x, create_graph=True)
            return torch.autograd.grad(dx.square().sum(), w)[0]

        torch.testing.assert_close(penalty(kernel_backend), penalty("reference"))


@pytest.mark.parametrize("options", [{"sub_batch_size": 2}, {"form": "relative_variance", "sub_batch_size": 3}])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "identity"])
def test_activation(backend, name, options):
    """With y and the rows of a pair saved, and with x."""
    torch.manual_seed(2)
    shape = (8, 2) if backend == "triton" else (8, 2, 2)  # the interpreter is slow
    x = torch.randn(shape, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    beta = (torch.rand(2, dtype=torch.float64, device=x.device) + 0.5).requires_grad_()

    def both(x, beta):
        return vk.vcl_activation(x, name, beta, alpha=0.7, backend=backend, **options)

    check_derivatives(backend, both, (x, beta))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "tanh"])
def test_gradient_penalty_of_the_activation_alone(kernel_backend, name):
    """Nobody asks for the loss, and the upstream gradient needs none: as through the bare activation, 0 of relu."""
    x = torch.randn(12, 3, dtype=torch.float64, device=device_of(kernel_backend), requires_grad=True)

    def penalty(backend):
        y, _ = vk.vcl_activation(x, name, sub_batch_size=3, backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(kernel_backend), penalty("reference"))


LOSSES = {
    "one pass": lambda x, beta=None, **to: vk.vcl_loss(x, beta, sub_batch_size=3, **to),
    "deferred": lambda x, beta=None, **to: vk.vcl_loss(
        torch.cat([x, x]), beta, sub_batch_size=3, num_sub_batches=2, **to
    ),
    "activation": lambda x, beta=None, **to: vk.vcl_activation(x, "elu", beta, sub_batch_size=3, **to)[1],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of ops without batching rules
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_several_upstream_gradients_at_once(name, form, reduction):
    inputs = case("cpu", form, "channel", "contiguous")
    options = {"form": form, "reduction": reduction}
    one, many = (LOSSES[name](*inputs, **options, backend=backend) for backend in ("reference", "cpu"))
    g = torch.randn(4, *one.shape, dtype=one.dtype)
    expected = [torch.autograd.grad(one, inputs, g[k], retain_graph=True) for k in range(4)]
    batched = torch.autograd.grad(many, inputs, g, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda g: torch.autograd.grad(many, inputs, g, retain_graph=True))(g)
    for found in (batched, mapped):
        for k in range(4):
            for got, wanted in zip(found, expected[k], strict=True):
                torch.testing.assert_close(got[k], wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_that_is_traced(name):
    """Its upstream gradient of 1 is no constant: the graph is right for others too."""
    inputs = case("cpu", "ratio", "channel", "contiguous")
    backward = make_fx(lambda g: torch.autograd.grad(LOSSES[name](*inputs), inputs, g))(inputs[0].new_ones(()))
    for upstream in (1.0, 2.5):
        g = inputs[0].new_tensor(upstream)
        expected = torch.autograd.grad(LOSSES[name](*inputs, backend="reference"), inputs, g)
        for got, wanted in zip(backward(g), expected, strict=True):
            torch.testing.assert_close(got, wanted)

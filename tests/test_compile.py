"""Eager and compiled code agree: where eager code raises, compiled code raises or is right."""

import pytest
import torch

import vcl_kernels as vk
from vcl_kernels.checks import check_activation, check_loss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def changed(t, by, in_place):
    return t.add_(by) if in_place else t + by


def after_activation(name, of, **options):
    """A change of x, y or beta after ``vcl_activation``."""

    def function(x, beta, by, in_place):
        tensors = {"x": x * 1.0, "beta": beta * 1.0}
        tensors["y"], loss = vk.vcl_activation(tensors["x"], name, tensors["beta"], **options)
        tensors[of] = changed(tensors[of], by[0] if of == "beta" else by, in_place)
        return sum(t.square().sum() for t in tensors.values()) + loss

    return function


def after_loss(of, dtype=torch.float32, **options):
    def function(x, beta, by, in_place):
        tensors = {"x": (x * 1.0).to(dtype), "beta": beta * 1.0}
        loss = vk.vcl_loss(tensors["x"], tensors["beta"], **options)
        tensors[of] = changed(tensors[of], by[0] if of == "beta" else by, in_place)
        return sum(t.float().square().sum() for t in tensors.values()) + loss

    return function


def after_moments(x, beta, by, in_place):
    z = x * 1.0
    mean, var = vk.sub_batch_moments(z, 4)
    return changed(z, by, in_place).square().sum() + mean.sum() + var.square().sum() + beta.sum()


def after_module(name, of, inject):
    module = vk.VCLActivation(name, 8, inject=inject, weight=0.5)

    def function(x, beta, by, in_place):
        z = x * beta
        y = module(z)
        z, y = (changed(t, by, in_place) if of == this else t for t, this in ((z, "x"), (y, "y")))
        return y.square().sum() + z.square().sum() + (0 if inject else module.loss)

    return function


CHANGES = {
    **{f"y of {name}": after_activation(name, "y") for name in ("relu", "leaky_relu", "elu", "tanh", "gelu", "silu")},
    **{f"x of {name}": after_activation(name, "x") for name in ("relu", "elu", "gelu", "silu")},
    "x of elu of all rows": after_activation("elu", "x", form="relative_variance"),
    "beta of elu": after_activation("elu", "beta"),
    "beta of gelu": after_activation("gelu", "beta", form="relative_variance"),
    "x of loss": after_loss("x"),
    "x of float16 loss": after_loss("x", torch.float16),
    "x of loss of all rows": after_loss("x", form="relative_variance", sub_batch_size=3),
    "beta of loss": after_loss("beta"),
    "beta of the reference": after_loss("beta", backend="reference"),
    "x of moments": after_moments,
    **{f"{of} of module, inject={i}": after_module("elu", of, i) for of in ("x", "y") for i in (False, True)},
    **{
        f"y of {name} module, inject={i}": after_module(name, "y", i)
        for name in ("gelu", "silu")
        for i in (False, True)
    },
}


def gradients_after(function, rows, in_place):
    torch.manual_seed(0)
    x, beta, by = torch.randn(rows, 8), torch.rand(8) + 0.5, torch.randn(rows, 8)
    x.requires_grad_()
    beta.requires_grad_()
    return torch.autograd.grad(function(x, beta, by, in_place), (x, beta))


@pytest.mark.parametrize("rows", [11, 20, 39, 64])
@pytest.mark.parametrize("change", CHANGES)
def test_what_backward_reads_is_changed_in_place(change, rows):
    """Never a gradient from values that were overwritten."""
    torch._dynamo.reset()
    function = CHANGES[change]
    wanted = gradients_after(function, rows, False)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    raised = []
    for run in (function, compiled):
        try:
            found = gradients_after(run, rows, True)
        except RuntimeError as error:
            assert "inplace" in str(error)  # noqa: PT017
            raised.append(run)
        else:
            torch.testing.assert_close(found, wanted)
    if change.startswith(("y of gelu", "y of silu")):  # whose backward reads x alone
        assert raised == []


def test_a_changed_output_of_a_compiled_activation_is_an_error():
    """As in eager code, and with the compiler that users have."""

    def step(x, by):
        y, loss = vk.vcl_activation(x * 1.0, "elu")
        y += by
        return y.square().sum() + loss

    x = torch.randn(20, 8, requires_grad=True)
    for run in (step, torch.compile(step)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(x, torch.randn(20, 8)).backward()


@pytest.mark.parametrize("rows", [16, 44])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_opcheck_of_the_ops_with_autograd(rows, wants_gradient):
    ops = torch.ops.vcl_kernels
    for x in (torch.randn(rows, 5, 3, 4).to(memory_format=torch.channels_last), torch.randn(rows, 7)):
        x.requires_grad_(wants_gradient)
        for given in (0.5, (torch.rand(x.shape[1]) + 0.5).requires_grad_(wants_gradient)):
            beta, spec = check_loss(x, given, 4, "ratio", "channel", None, "mean")
            torch.library.opcheck(ops.loss_autograd.default, (x, beta, *spec))
            torch.library.opcheck(ops.activation_autograd.default, (x, beta, *spec, *check_activation("elu"), False))
        torch.library.opcheck(ops.moments_autograd.default, (x, 4, 3, False))

"""VCL and VCLActivation: values, gradients, injected losses, and channels in another dimension than 1."""

import re

import pytest
import torch
from common import LEARNED
from torch import nn

import vcl_kernels as vk


def test_vcl_is_the_identity_and_keeps_the_loss():
    vcl, x = vk.VCL(6, weight=0.1, **LEARNED), torch.randn(20, 6, 4)
    assert vcl(x) is x
    loss = vcl.loss
    torch.testing.assert_close(loss, 0.1 * vk.vcl_loss(x, vcl.beta))
    vcl.eval()(x)
    assert vcl.loss is loss
    vcl.train()(x[:9])
    assert vcl.loss == 0
    last = vk.VCL((), weight=0.1, channel_dim=-1, **LEARNED)
    assert last(x) is x
    torch.testing.assert_close(last.loss, 0.1 * vk.vcl_loss(x.transpose(1, 2), 1.0))
    assert repr(last) == "VCL(form=ratio, n=5, unit=channel, weight=0.1, beta=(), channel_dim=-1)"


@pytest.mark.parametrize(
    ("form", "asked", "rows", "present"), [("ratio", 6, 40, 6), ("ratio", 99, 33, 6), ("variance", 3, 40, 3)]
)
def test_sub_batches_are_those_asked_for_as_far_as_the_batch_has_them(form, asked, rows, present):
    vcl, x = vk.VCL(form=form, num_sub_batches=asked, beta_mode="fixed"), torch.randn(rows, 4)
    vcl(x)
    torch.testing.assert_close(vcl.loss, vk.vcl_loss(x, form=form, num_sub_batches=present))


@pytest.mark.parametrize("unit", ["channel", "activation"])
@pytest.mark.parametrize(("shape", "dim"), [((20, 7, 12), 2), ((20, 3, 5, 12), -1), ((20, 12), -1)])
@pytest.mark.parametrize(
    ("activation", "form"), [("elu", "ratio"), ("gelu", "relative_variance"), ("identity", "ratio")]
)
def test_values_and_gradients_are_those_of_the_transposed(unit, shape, dim, activation, form):
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    settings = {"sub_batch_size": 4, "form": form, "unit": unit, "beta_mode": "learned"}
    ours, plain = vk.VCLActivation(activation, channel_dim=dim, **settings), vk.VCLActivation(activation, **settings)
    results = []
    for act, y in ((ours, ours(x)), (plain, plain(x.movedim(dim, 1).contiguous()).movedim(1, dim))):
        results.append((y, act.loss, *torch.autograd.grad(act.loss + (y * dy).sum(), (x, act.beta))))
    torch.testing.assert_close(*results)
    assert results[0][0].is_contiguous()
    assert ours.beta.shape == ((12,) if unit == "channel" else (12, *shape[1:-1]))


def test_channels_in_the_last_dimension_are_read_where_they_lie(monkeypatch):
    x = torch.randn(20, 7, 12, requires_grad=True)
    act = vk.VCLActivation("relu", 12, channel_dim=-1, **LEARNED)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("copied"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = act(x)
    assert y.stride() == x.stride()
    assert y.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in saved}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_one_graph():
    act, x = vk.VCLActivation("gelu", 12, channel_dim=-1, unit="channel"), torch.randn(20, 7, 12, requires_grad=True)

    def step(x):
        y = act(x)
        return y.sum() + act.loss

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x) for f in (compiled, step)))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("activation", "channel_dim"), [("elu", 1), ("gelu", 1), ("identity", 1), ("elu", -1)])
def test_an_injected_loss_is_as_an_added_one(activation, channel_dim, backend):
    settings = {**LEARNED, "weight": 0.5, "channel_dim": channel_dim, "backend": backend}
    x, w = torch.randn(12, 6, 6), torch.randn(12, 6, 6)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    added, injected = (vk.VCLActivation(activation, 6, inject=inject, **settings) for inject in (False, True))
    ((added(a) * w).sum() + added.loss).backward()
    (injected(b) * w).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(added.beta.grad, injected.beta.grad)
    assert torch.equal(added.loss, injected.loss)
    assert not injected.loss.requires_grad


@pytest.mark.parametrize("downstream", [torch.sum, lambda y: y.square().sum()])
@pytest.mark.parametrize("activation", ["tanh", "elu", "gelu"])
def test_a_second_derivative_of_an_injected_loss(activation, downstream):
    results = []
    for backend in ("cpu", "reference"):
        x = torch.linspace(-2, 3, 60, dtype=torch.float64).view(20, 3).requires_grad_()
        act = vk.VCLActivation(activation, inject=True, beta_mode="fixed", backend=backend)
        (dx,) = torch.autograd.grad(downstream(act(x)), x, create_graph=True)
        results.append((dx, *torch.autograd.grad(dx.square().sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wrong", ["last", 1.0, True, 0])
@pytest.mark.parametrize(
    "make", [vk.VCL, lambda **o: vk.VCLMonitor(vk.VCL(), **o), lambda **o: vk.attach(vk.VCL(), **o)]
)
def test_a_wrong_channel_dim_is_an_error_at_once(make, wrong):
    with pytest.raises((TypeError, ValueError), match="channel_dim must be an int; got|channel_dim must not be 0, the"):
        make(channel_dim=wrong)


@pytest.mark.parametrize("units", [None, 4])
@pytest.mark.parametrize(("dim", "shape"), [(3, (20, 7, 12)), (-3, (20, 7, 12)), (1, (20,)), (-1, (20,))])
def test_a_dimension_that_x_has_not_is_an_error(dim, shape, units):
    message = f"channel_dim must be a dimension of x; got {dim}" if len(shape) > 1 else "x must have 2 to 8 dimensions"
    with pytest.raises(ValueError, match=f"{message}.*{re.escape(str(shape))}"):
        vk.VCLActivation("elu", units, channel_dim=dim)(torch.randn(shape))


def test_a_learned_beta_for_inputs_of_another_size_is_an_error():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ELU())
    vk.attach(net, torch.randn(2, 2, 9), beta_mode="learned")
    with pytest.raises(ValueError, match=r"layer '1' has a learned beta of shape \(4, 7\), and .* \(4, 9\).*'channel'"):
        net(torch.randn(20, 2, 11))

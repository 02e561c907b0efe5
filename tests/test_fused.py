"""The modules that attach puts into a model: they count calls, and stand for the originals."""

import copy
import pickle
from functools import partial
from operator import methodcaller

import pytest
import torch
import torch.nn.functional as F
from common import LEARNED
from torch import nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk

attach = partial(vk.attach, weight=0.01, **LEARNED)


def mlp(activation=None):
    return nn.Sequential(nn.Linear(4, 8), activation or nn.ELU())


class Repeated(nn.Module):
    """Calls its activation by keyword, once or several times."""

    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, x, steps=1):
        for _ in range(steps):
            x = self.act(input=self.linear(x))
        return x


def test_an_injected_loss_costs_a_fused_activation_no_node_of_its_own():
    net = mlp()
    vk.attach(net, torch.randn(2, 4), inject=True)
    y = net(torch.randn(20, 4))
    node = y.grad_fn  # which torch 2.11 ends with y
    assert "ActivationAndLoss" in node.name()
    assert "Addmm" in node.next_functions[0][0].name()


@pytest.mark.parametrize(
    ("example", "steps", "has", "inject"),
    [(None, 2, 1, False), (None, 2, 1, True), ((torch.zeros(2, 4), 2), 3, 2, False)],
)
def test_a_call_that_the_example_did_not_make_is_an_error(example, steps, has, inject):
    net, x = Repeated(nn.Tanh()), torch.randn(20, 4)
    vk.attach(net, example, inject=inject)
    net(x, has)
    with pytest.raises(RuntimeError, match=f"'act' is called {steps} times .* VCL for {has}. .*example_input"):
        net(x, steps)


@pytest.mark.parametrize("act", [nn.Mish(), nn.LeakyReLU(0.3, inplace=True)])
def test_an_activation_called_by_keyword(act):
    net, x = Repeated(act), torch.randn(20, 4)
    pre = net.linear(x)
    expected = copy.deepcopy(act)(pre.clone())
    handle = attach(net, {"x": x[:2]}, weight=1.0)
    assert getattr(net.act, "inplace", None) == getattr(act, "inplace", None)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(handle.loss(), vk.vcl_loss(pre, torch.ones(4)))
    torch.testing.assert_close(net.eval()(x), expected)


def test_hooks_on_activations_still_run():
    net, outputs = mlp(), []
    net[1].register_forward_hook(lambda _module, _args, y: outputs.append(y))
    net[1].register_full_backward_hook(lambda *_: outputs.append("first"))
    handle = vk.attach(net)
    net[1].register_forward_hook(lambda *_: outputs.append("second"))
    y = net(torch.randn(20, 4))
    assert torch.equal(outputs[0], y)
    y.sum().backward()
    handle.remove()
    net(torch.randn(2, 4)).sum().backward()
    assert outputs[1:3] == ["second", "first"]
    assert outputs[4:] == ["second", "first"]


def test_modules_with_a_beta_are_called_as_modules():
    """Sharding and pruning provide parameters in hooks of the module."""
    net, called = nn.Sequential(*mlp(), nn.Linear(8, 8), nn.Mish()), []
    attach(net, torch.randn(2, 4))
    for index in (1, 3):
        net[index].vcl[0].register_forward_hook(lambda *_, index=index: called.append(index))
    net(torch.randn(20, 4))
    assert called == [1, 3]


def test_an_activation_with_a_forward_of_its_own_is_not_replaced():
    net, x = nn.Sequential(nn.ReLU()), torch.randn(20, 4)
    net[0].forward = lambda input: 7 * input.relu()
    handle = attach(net)
    torch.testing.assert_close(net(x.requires_grad_()), 7 * x.relu())
    torch.testing.assert_close(handle.loss(), 0.01 * vk.reference.vcl_loss(x))


def test_settings_that_change_are_taken_over():
    net, x = mlp(nn.LeakyReLU(0.1)), torch.randn(20, 8)
    handle = vk.attach(net, torch.randn(2, 4))
    assert type(net[1]) is nn.LeakyReLU
    net[1].negative_slope = 0.7
    for mode in (True, False):
        torch.testing.assert_close(net[1].train(mode)(x.requires_grad_()), F.leaky_relu(x, 0.7))
    net[1].train().negative_slope = "none"
    with pytest.raises(RuntimeError, match=r"'1' \(LeakyReLU\) was changed after attach.*attach again"):
        net[1](x)
    handle.remove()
    assert net[1].negative_slope == "none"


def test_a_shared_activation_under_checkpointing_is_refused():
    net, x = Repeated(nn.ReLU()), torch.randn(20, 4, requires_grad=True)
    net.forward = lambda x: checkpoint(type(net).forward, net, x, 2, use_reentrant=False)
    vk.attach(net, x[:2].detach(), inject=True)
    with pytest.raises(RuntimeError, match="Give each call a module of its own"):
        net(x).sum().backward()


def test_data_parallel_is_refused():
    """Its copies would have losses that nobody reads."""
    net = mlp()
    vk.attach(net, torch.randn(2, 4))
    replica = methodcaller("_replicate_for_data_parallel")(net)
    with pytest.raises(RuntimeError, match="cannot run in nn.DataParallel.*DistributedDataParallel"):
        replica(torch.randn(20, 4))


class ByFunction(nn.Module):
    """Keeps its function as an attribute, as activations of transformers do."""

    def __init__(self, function=None):
        super().__init__()
        self.act = function or self.by_hand

    def by_hand(self, x):
        return 0.5 * x * (1 + (x / 2**0.5).erf())

    def forward(self, x):
        return self.act(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [None, F.gelu, F.relu, partial(F.gelu, approximate="tanh")])
def test_a_function_that_a_module_keeps_is_compared_under_a_compiler_and_in_copies(function):
    net, x = mlp(ByFunction(function)), torch.randn(20, 4)
    pre = net[0](x)
    assert "fused" in str(attach(net, x))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net[1].act(pre))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(x)
        torch.testing.assert_close(other.vcl_handle.loss(), 0.01 * vk.vcl_loss(pre, 1.0))
        other[1].act = F.silu
        torch.testing.assert_close(other(x), F.silu(pre))
        other[1].act = other[1].by_hand
        torch.testing.assert_close(other(x), F.gelu(pre))
        torch.testing.assert_close(net(x), net[1].act(pre))


class Scaled(nn.Module):
    def forward(self, x, scale=None):
        return x.relu() if scale is None else x.relu() * scale


class Noting(nn.Module):
    """Keeps its latest input, and counts."""

    def __init__(self):
        super().__init__()
        self.latest, self.calls = None, 0

    def forward(self, x):
        self.latest, self.calls = x, self.calls + 1
        return x.relu()


def test_a_forward_that_does_more_than_the_activation_runs():
    scaled, noting, x = Scaled(), Noting(), torch.randn(20, 4)
    net = nn.Sequential(nn.Linear(4, 8), scaled, nn.Linear(8, 8), noting)
    handle = attach(net, x, weight=1.0)
    assert (noting.calls, noting.latest.shape) == (1, (20, 8))  # the example's run is one call
    net(x)
    pre = net[0](x)
    torch.testing.assert_close(handle.losses["1"], vk.vcl_loss(pre, 1.0).detach())
    torch.testing.assert_close(handle.losses["3"], vk.vcl_loss(net[2](pre.relu()), 1.0).detach())
    assert noting.calls == 2
    torch.testing.assert_close(scaled(pre, 3.0), 3 * pre.relu())

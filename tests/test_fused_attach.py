"""attach with fused activations: on models of many shapes, in evaluation, and exported."""

import collections
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk


class Residual(nn.Module):
    """Two convolutions around a shared, in-place activation, as in ResNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))) + x)


class Nested(nn.Module):
    """Activations in containers, one of them under two names, one that cannot be fused."""

    def __init__(self):
        super().__init__()
        shared = nn.LeakyReLU(0.2)
        self.list = nn.ModuleList([nn.Linear(6, 5), shared])
        self.dict = nn.ModuleDict({"gelu": nn.GELU("tanh"), "again": shared})
        self.deep = nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.ELU(0.5)), nn.Softplus(), nn.Tanh())

    def forward(self, x):
        x = self.dict["gelu"](self.list[1](self.list[0](x)))
        return self.deep(self.dict["again"](x))


class Functional(nn.Module):
    """The recipe for activations that are called as functions."""

    def __init__(self, fused):
        super().__init__()
        self.linear, self.fused = nn.Linear(6, 5), fused

    def forward(self, x):
        x = self.linear(x)
        if self.fused and self.training:
            x, self.loss = vk.vcl_activation(x, "relu")
            return x
        return F.relu(x)


MODELS = {
    "residual": (Residual, (20, 3, 6, 6), ["relu", "relu:1"]),
    "nested": (Nested, (20, 6), ["list.1", "list.1:1", "dict.gelu", "deep.0.1", "deep.1", "deep.2"]),
}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    make, shape, names = MODELS[request.param]
    return make(), torch.randn(shape), names


def losses_by_hand(net, x):
    """The loss of every activation's input, seen by hooks on the plain model."""
    found = []
    kinds = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.ELU, nn.Softplus, nn.Tanh)
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(vk.reference.vcl_loss(args[0].clone())))
        for module in net.modules()
        if isinstance(module, kinds)
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return sum(found)


def test_same_values_and_gradients_as_by_hand(case):
    net, x, names = case
    plain = copy.deepcopy(net)
    handle = vk.attach(net, x[:2], weight=0.3)
    (net(x).square().mean() + handle.loss()).backward()
    assert sorted(handle.losses) == sorted(names)
    (plain(x).square().mean() + 0.3 * losses_by_hand(plain, x)).backward()
    theirs = dict(plain.named_parameters())
    ours = {name: p for name, p in net.named_parameters() if "vcl" not in name}
    assert list(ours) == list(theirs)
    for name, p in ours.items():
        torch.testing.assert_close(p.grad, theirs[name].grad)


def test_evaluation_is_the_plain_model_bit_for_bit(case):
    net, x, _ = case
    expected = copy.deepcopy(net).eval()(x)
    handle = vk.attach(net, x[:2])
    net(x)
    loss = handle.loss()
    assert torch.equal(net.eval()(x), expected)
    assert torch.equal(handle.loss(), loss)


def test_remove_gives_the_modules_back(case):
    net, x, _ = case
    modules, names = dict(net.named_modules()), list(net.state_dict())
    handle = vk.attach(net, x[:2])
    net.eval()
    handle.remove()
    assert dict(net.named_modules()) == modules
    assert list(net.state_dict()) == names
    assert not any(module.training for module in net.modules())


def test_hooks_on_activations_still_run():
    seen = []
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    net[1].register_forward_hook(lambda module, args, y: seen.append(y))
    handle = vk.attach(net)
    y = net(torch.randn(20, 4))
    assert len(seen) == 1
    assert seen[0] is y
    net[1].register_forward_hook(lambda module, args, y: seen.append("second"))
    handle.remove()
    net(torch.randn(2, 4))
    assert len(seen) == 3


def test_functional_activation():
    torch.manual_seed(0)
    net, x = Functional(fused=True), torch.randn(20, 6)
    plain = Functional(fused=False)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x), plain(x))
    torch.testing.assert_close(net.loss, vk.reference.vcl_loss(net.linear(x)))
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))


def test_inplace_activation_leaves_its_input_alone_in_training():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    vk.attach(net, torch.randn(2, 4))
    pre = net[0](torch.randn(20, 4))
    kept = pre.clone()
    net[1](pre)
    assert torch.equal(pre, kept)


def convolutional():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ELU(), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(64, 3), nn.GELU())


def plain_and_attached(x):
    """The network in evaluation, before and after attach and a training step's forward."""
    plain, attached = convolutional(), convolutional()
    vk.attach(attached, x)
    attached(torch.randn(20, *x.shape[1:]))
    return plain.eval(), attached.eval()


def test_exported_graph_is_the_plain_networks():
    x = torch.randn(2, 1, 8, 8)
    graphs = []
    for net in plain_and_attached(x):
        program = torch.export.export(net, (x,))
        graphs.append([(node.op, str(node.target)) for node in program.graph.nodes if node.op == "call_function"])
    assert graphs[0] == graphs[1]
    assert len(graphs[0]) >= 7


@pytest.mark.filterwarnings("ignore")
def test_onnx_graph_is_the_plain_networks():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    x = torch.randn(2, 1, 8, 8)
    graphs = []
    for net in plain_and_attached(x):
        model = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
        onnx.checker.check_model(model)
        graphs.append(([node.op_type for node in model.graph.node], len(model.graph.initializer)))
    assert graphs[0] == graphs[1]
    assert {"Conv", "Elu", "Relu"} <= set(graphs[0][0])


def test_settings_that_fail_leave_the_model_alone():
    net = nn.Sequential(nn.ReLU(), nn.LeakyReLU(torch.tensor(0.1)))
    modules = list(net)
    with pytest.raises(TypeError, match="negative_slope must be a float"):
        vk.attach(net)
    assert list(net) == modules
    assert not hasattr(net, "vcl_handle")


def test_remove_restores_only_what_attach_put_there():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Tanh())
    handle = vk.attach(net)
    net[1] = nn.Identity()
    del net[2]
    handle.remove()
    assert [type(module) for module in net] == [nn.Linear, nn.Identity]


def test_activations_called_by_keyword_and_their_attributes():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.LeakyReLU(0.3, inplace=True)

        def forward(self, x):
            assert self.act.inplace
            return self.act(input=x)

    net, x = Keyword(), torch.randn(20, 4)
    vk.attach(net, torch.randn(2, 4))
    torch.testing.assert_close(net(x), F.leaky_relu(x, 0.3))
    torch.testing.assert_close(net.eval()(x.clone()), F.leaky_relu(x, 0.3))


def test_activation_with_a_forward_of_its_own_is_not_replaced():
    net, x = nn.Sequential(nn.ReLU()), torch.randn(20, 4)
    net[0].forward = lambda input: 7 * input
    handle = vk.attach(net)
    torch.testing.assert_close(net(x), 7 * x)
    torch.testing.assert_close(handle.loss(), 0.01 * vk.reference.vcl_loss(x))


def test_layers_named_twice_count_once():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    handle = vk.attach(net, torch.randn(2, 4), layers=["1", net[1]])
    net(torch.randn(20, 4))
    assert list(handle.losses) == ["1"]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("activation", ["elu", "gelu", "identity"])
def test_an_injected_loss_is_as_an_added_one(activation, channel_dim, backend):
    settings = {"weight": 0.5, "channel_dim": channel_dim, "backend": backend}
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
    found = []
    for backend in ("cpu", "reference"):
        x = torch.linspace(-2, 3, 60, dtype=torch.float64).view(20, 3).requires_grad_()
        act = vk.VCLActivation(activation, inject=True, learn_beta=False, backend=backend)
        (dx,) = torch.autograd.grad(downstream(act(x)), x, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx.square().sum(), x)))
    torch.testing.assert_close(*found)


def test_an_injected_loss_costs_a_fused_activation_no_node_of_its_own():
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    vk.attach(net, torch.randn(2, 4), inject=True)
    y = net(torch.randn(20, 4))
    node = y.grad_fn  # which torch 2.11 ends with y
    assert "ActivationAndLoss" in node.name()
    assert "Addmm" in node.next_functions[0][0].name()


class InPlace(nn.Module):
    """Adds what an in-place activation left in its input, or what was there before."""

    def __init__(self, act, keep):
        super().__init__()
        self.first, self.act, self.last, self.keep = nn.Linear(4, 4), act, nn.Linear(4, 4), keep

    def forward(self, x):
        x = self.first(x)
        return x + self.last(self.act(x.clone() if self.keep else x))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True)])
def test_a_model_that_reads_what_is_overwritten_is_refused(act):
    x = torch.randn(20, 4)
    with pytest.raises(ValueError, match="something else reads what they overwrite"):
        vk.attach(InPlace(act, keep=False), x)
    assert act.inplace
    net, before = InPlace(act, keep=True), x.clone()
    expected = net(x)
    vk.attach(net, x)
    assert torch.equal(net(x), expected)
    assert torch.equal(x, before)


def test_a_model_that_draws_numbers_is_not_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.RReLU(inplace=True), nn.Linear(8, 2))
    net[1].forward = lambda x: F.rrelu(x, training=True, inplace=net[1].inplace)
    vk.attach(net, torch.randn(20, 4))
    assert net(torch.randn(20, 4)).shape == (20, 2)


def test_the_example_leaves_the_input_and_the_mode_alone():
    class Adapter(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("would merge its weights")

    net, x = nn.Sequential(nn.ELU(inplace=True), Adapter(4, 2)), torch.randn(20, 4)
    before = x.clone()
    vk.attach(net, collections.UserDict(input=x))
    assert torch.equal(x, before)
    assert all(module.training for module in net.modules())


def test_places_that_the_example_does_not_show():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.never, self.act, self.soft = nn.Linear(4, 8), nn.Tanh(), nn.ELU(), nn.Softplus()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.act(self.first(x)) * self.soft(self.scale)

    net = Net()
    with pytest.warns(UserWarning, match="the example does not reach never;"):
        handle = vk.attach(net, torch.randn(2, 4))
    net(torch.randn(20, 4)).sum().backward()
    assert list(handle.losses) == ["act"]


def test_settings_of_the_module_are_set_through_its_stand_in():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.1)), torch.randn(20, 8)
    handle = vk.attach(net, torch.randn(2, 4))
    net[1].negative_slope = 0.7
    for mode in (True, False):
        torch.testing.assert_close(net[1].train(mode)(x), F.leaky_relu(x, 0.7))
    handle.remove()
    assert net[1].negative_slope == 0.7


def test_a_copy_has_its_own_handle():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 4), nn.Sigmoid()), torch.randn(20, 4)
    handle = vk.attach(net, x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        (other(x).sum() + other.vcl_handle.loss()).backward()
        assert {name for name, p in other.named_parameters() if p.grad is not None} == set(dict(net.named_parameters()))
        assert all(p.grad is None for p in net.parameters())
        other.vcl_handle.remove()
        assert not any("vcl" in name for name in other.state_dict())
    net(x)
    assert handle.loss().requires_grad


def test_frozen_layers_stay_without_a_graph():
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 8), nn.GELU())
    net.requires_grad_(False)
    handle = vk.attach(net, torch.randn(2, 4))
    assert not net(torch.randn(20, 4)).requires_grad
    handle.loss().backward()
    assert all(beta.grad.abs().sum() > 0 for beta in handle.parameters())


def test_attach_comes_before_wrappers_for_distributed_training(monkeypatch):
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", nn.Module.__init__)
    wrapped = nn.parallel.DistributedDataParallel()
    wrapped.module = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*wrap it afterwards"):
        vk.attach(wrapped)
    vk.attach(wrapped, learn_beta=False)


def test_a_second_remove_does_nothing():
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    first = vk.attach(net)
    first.remove()
    second = vk.attach(net)
    first.remove()
    net(torch.randn(20, 4))
    assert second.loss().requires_grad


def test_a_part_of_an_attached_model_is_noticed():
    part = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    vk.attach(nn.Sequential(part, nn.Tanh()))
    with pytest.raises(ValueError, match="'1' has an attribute 'vcl' already"):
        vk.attach(part)


def test_part_of_a_model_may_have_a_higher_precision():
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    handle = vk.attach(net, torch.randn(2, 4))
    net.bfloat16()
    assert net[1](torch.randn(20, 8)).dtype == torch.float32
    handle.loss().backward()
    assert net[1].vcl[0].beta.grad.dtype == torch.bfloat16


def test_attached_submodule_is_noticed():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Tanh())
    vk.attach(net[0])
    with pytest.raises(ValueError, match="attached already, to its submodule '0'"):
        vk.attach(net)


def test_shared_activation_under_checkpointing_is_refused():
    net, x = Residual(), torch.randn(20, 3, 6, 6, requires_grad=True)
    net.forward = lambda x: checkpoint(type(net).forward, net, x, use_reentrant=False)
    vk.attach(net, x[:2].detach(), inject=True)
    with pytest.raises(RuntimeError, match="Give each call a module of its own"):
        net(x).sum().backward()


def test_the_module_that_has_beta_is_called_as_a_module():
    """Sharding and pruning give it its parameters in hooks of its own."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 8), nn.Mish())
    vk.attach(net, torch.randn(2, 4))
    called = []
    for index in (1, 3):
        net[index].vcl[0].register_forward_hook(lambda *_, index=index: called.append(index))
    net(torch.randn(20, 4))
    assert called == [1, 3]


def test_replicas_of_a_model_keep_their_own_losses():
    """Of nn.DataParallel, which is not supported: an error, not the loss of the last replica."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    handle = vk.attach(net, torch.randn(2, 4))
    replica = nn.Sequential(net[0], net[1]._replicate_for_data_parallel())
    calls = replica[1]._modules["vcl"] = net[1].vcl._replicate_for_data_parallel()
    calls._modules["0"] = net[1].vcl[0]._replicate_for_data_parallel()
    calls[0]._parameters = {"beta": net[1].vcl[0].beta}
    replica(torch.randn(20, 4))
    assert calls[0].loss is not None
    with pytest.raises(RuntimeError, match="wants a training forward"):
        handle.loss()

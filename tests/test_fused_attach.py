"""attach with fused activations: on models of many shapes, in evaluation, and exported."""

import copy

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
    assert not hasattr(net, "_vcl_calls")


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


def test_an_injected_loss_costs_a_fused_activation_no_node_of_its_own():
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    vk.attach(net, torch.randn(2, 4), inject=True)
    node = net(torch.randn(20, 4)).grad_fn
    assert "ActivationAndLoss" in node.name()
    assert "Addmm" in node.next_functions[0][0].name()


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

"""attach and its handle, as a training loop meets them: losses, evaluation, copies, removal, errors."""

import copy
import pickle
from functools import partial

import pytest
import torch
from common import LEARNED
from torch import nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk

attach = partial(vk.attach, **LEARNED)  # a test that calls vk.attach is about any settings


def network():
    features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ELU())
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(64, 3))


def mlp(activation=None):
    return nn.Sequential(nn.Linear(4, 8), activation or nn.ELU())


def images(rows=20):
    return torch.randn(rows, 1, 8, 8)


class Residual(nn.Module):
    """Two convolutions around a shared, in-place activation, as in ResNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))) + x)


class Nested(nn.Module):
    """Activations in containers, one of them under two names, one that cannot be fused."""

    def __init__(self):
        super().__init__()
        shared = nn.LeakyReLU(0.2)
        self.list = nn.ModuleList([nn.Linear(8, 5), shared])
        self.dict = nn.ModuleDict({"gelu": nn.GELU("tanh"), "again": shared})
        self.deep = nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.ELU(0.5)), nn.Softplus(), nn.Tanh())

    def forward(self, x):
        x = self.dict["gelu"](self.list[1](self.list[0](x[:, 0, 0])))
        return self.deep(self.dict["again"](x))


MODELS = {
    network: ["1", "3"],
    Residual: ["relu", "relu:1"],
    Nested: ["deep.0.1", "deep.1", "deep.2", "dict.gelu", "list.1", "list.1:1"],
}
models = pytest.mark.parametrize("make", MODELS)


def losses_by_hand(net, x):
    """The loss of every activation's input, read by hooks on the plain model."""
    losses = []
    for module in net.modules():
        if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.ELU, nn.Softplus, nn.Tanh)):
            module.register_forward_pre_hook(lambda _, args: losses.append(vk.reference.vcl_loss(args[0].clone())))
    return net(x), sum(losses)


@models
def test_values_and_gradients_are_those_by_hand(make):
    net, x = make(), images()
    plain = copy.deepcopy(net)
    handle = attach(net, x[:2], weight=0.3)
    y = net(x)
    (y.square().mean() + handle.loss()).backward()
    expected, loss = losses_by_hand(plain, x)
    (expected.square().mean() + 0.3 * loss).backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(handle.loss(), 0.3 * loss)
    torch.testing.assert_close(sum(handle.losses.values()), handle.loss().detach())
    assert sorted(handle.losses) == MODELS[make]
    assert all(beta.grad.abs().sum() > 0 for beta in handle.parameters())
    ours, theirs = ({name: p.grad for name, p in m.named_parameters() if "vcl" not in name} for m in (net, plain))
    torch.testing.assert_close(ours, theirs)


@models
def test_evaluation_and_removal_give_the_plain_model(make):
    net, x = make(), images()
    modules, names = dict(net.named_modules()), list(net.state_dict())
    expected = copy.deepcopy(net)(x[:7])
    handle = vk.attach(net, x[:2])
    assert [name for name in net.state_dict() if "vcl" not in name] == names
    net(x)
    loss = handle.loss()
    with torch.no_grad():
        assert torch.equal(net.eval()(x[:7]), expected)
        assert (handle.loss(), handle.losses) == (0, {})
    net.train()(x)
    torch.testing.assert_close(handle.loss(), loss)
    net.eval()
    handle.remove()
    assert dict(net.named_modules()) == modules
    assert list(net.state_dict()) == names
    assert not any(module.training for module in modules.values())
    assert all(module.inplace for module in modules.values() if isinstance(module, nn.ReLU))
    assert torch.equal(net(x[:7]), expected)


@pytest.mark.filterwarnings("ignore")
def test_exported_graphs_are_the_plain_models():
    plain, attached, x = network(), network(), images(2)
    vk.attach(attached, x)
    attached(images())
    programs = [torch.export.export(net.eval(), (x,)) for net in (plain, attached)]
    ops = [[str(node.target) for node in program.graph.nodes if node.op == "call_function"] for program in programs]
    assert ops[0] == ops[1]
    assert len(ops[0]) >= 6
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = torch.onnx.export(programs[1], dynamo=True, verbose=False).model_proto
    onnx.checker.check_model(model)
    assert [n.op_type for n in model.graph.node if n.op_type != "Reshape"] == ["Conv", "Relu", "Conv", "Elu", "Gemm"]


def test_remove_restores_only_what_attach_put_there_and_only_once():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Hardswish(inplace=True), nn.Tanh())
    first = vk.attach(net)
    assert repr(first) == "VCLHandle(1, 2, 3)"
    assert not net[2].inplace
    net[1] = nn.Identity()
    del net[3]
    first.remove()
    assert [type(module) for module in net] == [nn.Linear, nn.Identity, nn.Hardswish]
    assert net[2].inplace
    second = vk.attach(net)
    first.remove()
    with pytest.raises(RuntimeError, match="this handle was removed"):
        first.loss()
    net(torch.randn(20, 4))
    assert second.loss().requires_grad


def test_inject_under_a_scaler_equals_adding_the_loss():
    plain, x, scaler = network(), images(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    injected = copy.deepcopy(plain)
    a, b = attach(plain, x[:1], weight=0.3), attach(injected, x[:1], weight=0.3, inject=True)
    b.grad_scaler = scaler
    assert b.grad_scaler is scaler
    (plain(x).square().mean() + a.loss()).backward()
    scaler.scale(injected(x).square().mean()).backward()
    for p, q in zip(plain.parameters(), injected.parameters(), strict=True):
        torch.testing.assert_close(p.grad * 1024, q.grad)
    assert not b.loss().requires_grad


def test_a_loss_without_a_graph_is_an_error():
    net, x = network(), images()
    handle = vk.attach(net, x[:1], weight=1.0)
    with pytest.raises(RuntimeError, match="wants a training forward"):
        handle.loss()
    y = checkpoint(net, x.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="ran without grad mode.*use_reentrant=False"):
        handle.loss()
    y.sum().backward()
    with torch.no_grad():
        net(x)
        assert handle.loss() > 0
    assert all(value > 0 for value in handle.losses.values())


@pytest.mark.parametrize("inject", [False, True])
def test_checkpoint_counts_the_loss_once(inject):
    net, x, gradients = network(), images(), []
    handle = attach(net, x[:1], weight=1.0, inject=inject)
    for recompute in (False, True):
        y = checkpoint(net, x.requires_grad_(), use_reentrant=False) if recompute else net(x)
        loss = y.square().mean()
        gradients.append(torch.autograd.grad(loss if inject else loss + handle.loss(), list(net.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shared_beta", [False, True])
def test_losses_since_the_last_reading_count_and_no_older_ones(shared_beta):
    net, x = nn.Sequential(mlp(), mlp(nn.Hardswish())), torch.randn(20, 4)
    net[1][0] = nn.Linear(8, 8)
    handle = vk.attach(net, x, shared_beta=shared_beta)

    def counted():
        losses = handle.losses
        assert handle.loss() == handle.loss() == sum(losses.values())
        return list(losses)

    net(x)
    assert counted() == ["0.1", "1.1"]
    first = handle.losses["0.1"]
    for _ in range(2):
        net[0](x)
        assert counted() == ["0.1"]
        assert handle.losses["0.1"] == first
    net[1](torch.randn(20, 8))
    assert counted() == ["1.1"]
    net[0].eval()
    net(x)
    assert counted() == ["1.1"]
    net.eval()
    net[1](net[0](x))
    assert handle.loss() == 0


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda net: net.to("cpu", torch.bfloat16)])
def test_betas_of_a_half_precision_model_move_by_small_steps(cast):
    net = mlp()
    handle = attach(net, torch.randn(2, 4))
    half = cast(net)[0].weight.dtype
    (beta,) = handle.parameters()
    assert beta.dtype == torch.float32 != half
    (net(torch.randn(20, 4, dtype=half)).sum() + handle.loss()).backward()
    torch.optim.Adam([beta], lr=1e-3).step()
    torch.testing.assert_close((beta - 1).abs(), torch.full_like(beta, 1e-3), rtol=0.1, atol=0)


@pytest.mark.parametrize("inject", [False, True])
def test_a_short_batch_gives_every_beta_a_gradient_of_zero(inject):
    net = network()
    handle = attach(net, images(1), inject=inject)
    with pytest.warns(
        vk.VCLWarning, match=r"layer '1' got an input of shape \(9, 6, 6, 6\).*fewer than 2 .* = 10 rows"
    ):
        loss = net(images(9)).sum() + (0 if inject else handle.loss())
    assert handle.loss() == 0
    loss.backward()  # DistributedDataParallel waits for the gradient of each parameter
    assert all(torch.equal(beta.grad, torch.zeros_like(beta)) for beta in handle.parameters())


def test_copies_have_handles_and_losses_of_their_own():
    net, x = nn.Sequential(*mlp(), nn.Linear(8, 4), nn.Hardswish(inplace=True)), torch.randn(20, 4)
    handle = attach(net, x)
    net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[1].vcl[0].loss is None
        (other(x).sum() + other.vcl_handle.loss()).backward()
        torch.testing.assert_close(other.vcl_handle.loss(), handle.loss())
        assert {name for name, p in other.named_parameters() if p.grad is not None} == set(dict(net.named_parameters()))
        assert all(p.grad is None for p in net.parameters())
        other.vcl_handle.remove()
        assert not any("vcl" in name for name in other.state_dict())
        assert (other[3].inplace, net[3].inplace) == (True, False)
    assert handle.loss().requires_grad


def test_betas_without_a_shape_are_saved_and_loaded():
    first, second = network(), network()
    attach(first), attach(second)
    second.load_state_dict(first.state_dict())
    assert "from the first batch" in repr(second)
    first(images())
    copy.deepcopy(second).load_state_dict(first.state_dict())
    second.load_state_dict(first.state_dict())
    assert [tuple(beta.shape) for beta in second.vcl_handle.parameters()] == [(6,), (4,)]


class Wrapped(nn.parallel.DistributedDataParallel):
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def test_a_model_that_is_wrapped_gains_and_loses_no_parameters():
    net = Wrapped(nn.Sequential(nn.BatchNorm1d(4), nn.ELU()))
    for change in (attach, vk.remove_batch_norm):
        with pytest.raises(ValueError, match="DistributedDataParallel.*wrap it afterwards"):
            change(net)
    assert list(vk.attach(net, beta_mode="fixed").parameters()) == []


def attached(module):
    vk.attach(module)
    return module


def with_attribute():
    net = mlp()
    net[1].vcl = 3
    return net


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (network, {"layers": ["nine"]}, "layers must name modules.*'nine'"),
        (network, {"layers": [nn.ReLU()]}, "layers must name modules.*ReLU"),
        (network, {"layers": []}, "layers must choose at least one"),
        (Nested, {"layers": ["deep.0"]}, "container; 'deep.0' is one"),
        (with_attribute, {}, "'1' has an attribute 'vcl' already"),
        (lambda: attached(nn.Sequential(mlp(nn.Sigmoid()), nn.Tanh()))[0], {}, "'1' has an attribute 'vcl' already"),
        (lambda: attached(mlp()), {}, "attached already; call vk.handle_of"),
        (lambda: nn.Sequential(attached(mlp()), nn.Tanh()), {}, "attached already in its submodule '0'"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "no activation modules"),
        (network, {"form": "wrong"}, "form must be"),
        (nn.ELU, {}, r"model is one activation \(ELU\); attach to the model around it"),
    ],
)
def test_errors(make, options, message):
    net = make()
    modules, names = list(net.modules()), list(net.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        vk.attach(net, **options)
    assert list(net.modules()) == modules
    assert list(net.state_dict()) == names


@pytest.mark.parametrize("layers", [["2", "5"], ["2", "5", "2"], lambda name, _module: name in ("2", "5")])
def test_layers_are_chosen_by_name_or_predicate_and_count_once(layers):
    net, x = network(), images()
    handle = vk.attach(net, x[:1], layers=layers)
    net(x)
    assert list(handle.losses) == ["2", "5"]
    handle.remove()
    assert repr(vk.attach(net, layers=[net[5]])) == "VCLHandle(5)"


def test_param_groups():
    net = nn.ModuleList([network(), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)])
    attach(net[0], images(1))
    decayed, free = vk.param_groups(net, 1e-4)
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))
    torch.optim.SGD([decayed, free], lr=0.1)


def test_precisions_may_be_mixed():
    net, x = network(), images()
    handle = attach(net, x[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    assert handle.loss().dtype == torch.float32
    (out.float().mean() + handle.loss()).backward()
    assert net[0].weight.grad.isfinite().all()
    net.bfloat16()
    assert net[1](torch.randn(20, 6, 2, requires_grad=True)).dtype == torch.float32
    handle.loss().backward()
    assert net[1].vcl[0].beta.grad.dtype == torch.float32


def test_a_frozen_part_gets_no_vcl():
    net = nn.Sequential(*mlp(), nn.Linear(8, 8), nn.GELU())
    net[0].requires_grad_(False)
    handle = vk.attach(net, torch.randn(2, 4), weight=1.0)
    net(torch.randn(20, 4))
    assert list(handle.losses) == ["3"]
    net.requires_grad_(False)
    assert not net(torch.randn(20, 4)).requires_grad
    with pytest.warns(vk.VCLWarning, match="no layer with VCL got an input that needs a gradient"):
        assert handle.loss() == 0

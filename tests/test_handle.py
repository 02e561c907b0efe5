"""What a handle sets during training, how it is found, and the states and devices of an attached model."""

import copy
import pickle

import pytest
import torch
from common import LEARNED
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk

SETTINGS = {**LEARNED, "weight": 0.5}


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 6), nn.Mish(), nn.Linear(6, 2))


def attached(**settings):
    net = network()
    return net, vk.attach(net, torch.randn(2, 4), **{**SETTINGS, **settings})


def step(net, handle, x, function=None):
    """The gradients of a step, of the model's parameters and of beta, by name; those of the model by itself."""
    net.zero_grad()
    loss = (function or net)(x).square().mean()
    (loss if handle is None or handle.layers["1"].inject else loss + handle.loss()).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def by_hand(net, x, weight, weights=(1.0, 1.0)):
    """The same of a model with VCL attached, from its layers and its betas."""
    net.zero_grad()
    first = net[0](x)
    second = net[2](torch.nn.functional.elu(first))
    y = net[4](torch.nn.functional.mish(second))
    pairs = zip((first, second), net.vcl_handle.layers.values(), weights, strict=True)
    losses = [weight * w * vk.reference.vcl_loss(pre, vcl.beta) for pre, vcl, w in pairs]
    (y.square().mean() + sum(losses)).backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("inject", [False, True])
def test_weights_may_change_between_steps(inject):
    net, handle = attached(inject=inject)
    assert handle.weight == 0.5
    for weight, of_first, of_second in ((0.5, 1.0, 1.0), (2.0, 1.0, 1.0), (0.1, 3.0, 0.0)):
        handle.weight = weight
        handle.layers["1"].weight, handle.layers["3"].weight = of_first, of_second
        x = torch.randn(20, 4)
        found = step(net, handle, x)
        torch.testing.assert_close(found, by_hand(net, x, weight, (of_first, of_second)))
        torch.testing.assert_close(sum(handle.losses.values()), handle.loss().detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("rows", [20, 100])  # more than a fourth of them take part, or fewer
@pytest.mark.parametrize("first", [0.5, 0.0])
@pytest.mark.parametrize("inject", [False, True])
def test_weights_that_change_do_not_compile_again_and_again(inject, first, rows):
    graphs, (net, handle) = [], attached(inject=inject, weight=first)
    compiled = torch.compile(net, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    if inject:
        handle.accumulation = 4
    for weight in (first, 0.4, 0.3, 0.2, 0.0):
        handle.weight = weight
        handle.layers["1"].weight = 1 + weight
        x = torch.randn(rows, 4)
        found = step(net, handle, x, compiled)
        torch.testing.assert_close(found, step(net, handle, x))
    assert len(graphs) <= 2


@pytest.mark.parametrize("inject", [False, True])
def test_paused_it_is_the_plain_model(inject):
    net, handle = attached(inject=inject)
    plain = network()
    plain.load_state_dict(vk.plain_state_dict(net.state_dict()))
    x = torch.randn(20, 4)
    with handle.paused():
        net.zero_grad()
        (net(x).square().mean() + handle.loss()).backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    assert [found.pop(name) for name in list(found) if "vcl" in name] == [None, None]
    torch.testing.assert_close(found, step(plain, None, x))
    torch.testing.assert_close(step(net, handle, x), by_hand(net, x, 0.5))


def test_a_loss_from_before_a_pause_can_still_be_read():
    net, handle = attached()
    x = torch.randn(20, 4)
    wanted = by_hand(net, x, 0.5)
    net.zero_grad()
    y = net(x)
    with handle.paused(), handle.paused():
        net(torch.randn(20, 4))
    with pytest.raises(ZeroDivisionError), handle.paused():
        _ = 1 // 0
    (y.square().mean() + handle.loss()).backward()
    torch.testing.assert_close({name: p.grad for name, p in net.named_parameters()}, wanted)
    torch.testing.assert_close(step(net, handle, x), wanted)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_accumulated_injected_losses_are_averaged(compiled):
    net, handle = attached(inject=True)
    batches, sums = torch.randn(3, 20, 4), {}
    for x in batches:
        for name, gradient in by_hand(net, x, 0.5).items():
            sums[name] = sums.get(name, 0) + gradient / 3
    net.zero_grad()
    handle.accumulation = 3
    function = torch.compile(net, backend="eager") if compiled else net
    for x in batches:
        (function(x).square().mean() / 3).backward()
    torch.testing.assert_close({name: p.grad for name, p in net.named_parameters()}, sums)
    assert handle.accumulation == 3


@pytest.mark.parametrize(("inject", "name", "value", "message"), [
    (True, "accumulation", 0, "accumulation must be"),
    (True, "accumulation", 2.0, "accumulation must be"),
    (False, "accumulation", 2, "accumulation is for inject=True"),
    (False, "weight", "much", "weight must be"),
])  # fmt: skip
def test_what_cannot_be_set(inject, name, value, message):
    _, handle = attached(inject=inject)
    before = getattr(handle, name)
    with pytest.raises((TypeError, ValueError), match=message):
        setattr(handle, name, value)
    assert getattr(handle, name) == before


def test_a_backend_is_passed_on():
    _, handle = attached(backend="reference")
    assert {vcl.backend for vcl in handle.layers.values()} == {"reference"}
    with pytest.raises(ValueError, match="backend must be one of 'cpu', 'triton', 'reference'; got 'abacus'"):
        vk.attach(network(), torch.randn(2, 4), backend="abacus")


class Recurrent(nn.Module):
    def __init__(self, act, recompute=False):
        super().__init__()
        self.linear, self.act, self.recompute = nn.Linear(4, 4), act, recompute

    def forward(self, x, steps):
        if self.recompute:
            return checkpoint(self.run, x, steps, use_reentrant=False)
        return self.run(x, steps)

    def run(self, x, steps):
        for _ in range(steps):
            x = self.act(self.linear(x))
        return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("act", [nn.Tanh, nn.Softplus])
def test_one_beta_for_all_calls(act, inject, recompute):
    net = Recurrent(act(), recompute)
    handle = vk.attach(net, (torch.randn(2, 4), 2), shared_beta=True, inject=inject, **SETTINGS)
    assert list(handle.layers) == ["act"]
    for steps in (5, 1, 2):
        net.zero_grad()
        x = torch.randn(20, 4, requires_grad=True)
        loss = net(x, steps).square().mean()
        (loss if inject else loss + handle.loss()).backward()
        found = {name: p.grad for name, p in net.named_parameters()}
        net.zero_grad()
        beta, y, losses = handle.layers["act"].beta, x, []
        for _ in range(steps):
            y = net.linear(y)
            losses.append(0.5 * vk.reference.vcl_loss(y, beta))
            y = act()(y)
        (y.square().mean() + sum(losses)).backward()
        torch.testing.assert_close(found, {name: p.grad for name, p in net.named_parameters()})
        torch.testing.assert_close(handle.losses, {"act": sum(losses).detach()})


def test_calls_of_different_widths_cannot_share_a_beta():
    act = nn.GELU()
    net = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 5), act)
    with pytest.raises(ValueError, match=r"shared_beta wants the same units.*'1' have betas of shapes \(5,\), \(6,\)"):
        vk.attach(net, torch.randn(2, 4), shared_beta=True, **SETTINGS)
    assert len(vk.attach(net, torch.randn(2, 4), **SETTINGS).layers) == 2


def test_a_handle_is_found_by_its_model():
    net, handle = attached()
    assert vk.handle_of(net) is handle
    assert vk.handle_of(torch.compile(net, backend="eager")) is handle
    assert vk.handle_of(nn.Sequential(nn.Identity(), net)) is handle
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert vk.handle_of(other).model is other
        assert vk.handle_of(other).layers["1"] is other[1].vcl[0]
        assert vk.handle_of(other).weight == 0.5
    handle.remove()
    with pytest.raises(ValueError, match=r"model \(Sequential\) has no VCL attached"):
        vk.handle_of(net)


def test_plain_checkpoints_load_and_betas_stay():
    plain = nn.Sequential(network(), nn.ReLU())
    net = copy.deepcopy(plain)
    handle = vk.attach(net, torch.randn(2, 4), **SETTINGS)
    checkpoint = {name: torch.randn_like(p) for name, p in plain.state_dict().items()}
    for beta in handle.parameters():
        nn.init.constant_(beta, 3.0)
    net.load_state_dict(checkpoint)
    torch.testing.assert_close(vk.plain_state_dict(net.state_dict()), checkpoint)
    assert all((beta == 3).all() for beta in handle.parameters())
    net[0].load_state_dict(plain[0].state_dict())
    assert torch.equal(net[0][0].weight, plain[0][0].weight)
    assert all((beta == 3).all() for beta in handle.parameters())
    plain.load_state_dict(vk.plain_state_dict(net.state_dict()))
    assert len(net.state_dict()) == len(plain.state_dict()) + 3
    other = copy.deepcopy(net)
    other.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    assert all((beta == 4).all() for beta in vk.handle_of(other).parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({name: value for name, value in checkpoint.items() if name != "0.0.weight"})


def test_an_optimizers_state_goes_on():
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    step(net, None, torch.randn(20, 4))
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    handle = vk.attach(net, torch.randn(2, 4), **SETTINGS)
    optimizer.add_param_group({"params": list(handle.parameters())})
    found = optimizer.state_dict()
    assert found["param_groups"][:1] == before["param_groups"]
    torch.testing.assert_close(found["state"], before["state"])
    betas = [beta.clone() for beta in handle.parameters()]
    step(net, handle, torch.randn(20, 4))
    optimizer.step()
    assert all((beta != old).all() for beta, old in zip(handle.parameters(), betas, strict=True))


def initialise(net):
    torch.manual_seed(5)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def test_an_example_on_meta_makes_betas_there():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    handle = vk.attach(net, torch.empty(2, 4, device="meta"), **SETTINGS)
    assert [(beta.device.type, tuple(beta.shape)) for beta in handle.parameters()] == [("meta", (8,))]


def on_meta(**settings):
    with torch.device("meta"):
        net = network()
        handle = vk.attach(net, torch.empty(2, 4), **SETTINGS, **settings)
    assert all(p.is_meta for p in net.parameters())
    return net, handle


@pytest.mark.parametrize("beta_init", [1.0, 2.5])
@pytest.mark.parametrize("inject", [False, True])
def test_attached_on_meta_it_is_as_attached_on_a_device(inject, beta_init):
    net, handle = on_meta(inject=inject, beta_init=beta_init)
    net.to_empty(device="cpu")
    other, of_other = attached(inject=inject, beta_init=beta_init)
    initialise(net), initialise(other)
    assert str(handle) == str(of_other)
    torch.testing.assert_close(net.state_dict(), other.state_dict())
    assert all((beta == beta_init).all() for beta in handle.parameters())
    x = torch.randn(20, 4)
    torch.testing.assert_close(step(net, handle, x), step(other, of_other, x))


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.parametrize("inject", [False, True])
def test_attached_on_meta_sharded_and_materialised(inject):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    net, handle = on_meta(inject=inject)
    for layer in (*net, net):
        distributed.fsdp.fully_shard(layer, mesh=mesh)
    net.to_empty(device="cpu")
    initialise(net)
    other, of_other = attached(inject=inject)
    other.load_state_dict({name: value.full_tensor() for name, value in net.state_dict().items()})
    assert all((beta.full_tensor() == 1).all() for beta in handle.parameters())
    x = torch.randn(20, 4)
    found, wanted = step(net, handle, x), step(other, of_other, x)
    torch.testing.assert_close({name: g.full_tensor() for name, g in found.items()}, wanted)
    torch.testing.assert_close(handle.losses, of_other.losses)
    with pytest.raises(ValueError, match="FSDPModule.*wrap it afterwards"):
        vk.attach(nn.Sequential(distributed.fsdp.fully_shard(network(), mesh=mesh)), beta_mode="learned")


@pytest.mark.parametrize("shared_beta", [False, True])
def test_injected_losses_of_parts_are_those_of_one_step(shared_beta):
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))})
    handle = vk.attach(net, inject=True, shared_beta=shared_beta)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    x, seen = torch.randn(10, 4), []
    for _ in range(3):
        net["body"](x).sum().backward()
        optimizer.step()
        seen.append(handle.losses["body.1"])
    assert seen[0] > 0
    assert seen[1:] == [seen[0]] * 2


def test_a_handle_of_a_wrapper_that_passes_attributes_on_is_removed():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

        def __setattr__(self, name, value):
            super().__setattr__(name, value) if name in ("training", "module") else setattr(self.module, name, value)

    net = Wrapper(nn.Sequential(nn.Linear(4, 8), nn.ELU()))
    handle = vk.attach(net, torch.randn(2, 4))
    handle.remove()
    assert handle.layers == {}
    with pytest.raises(ValueError, match="no VCL attached"):
        vk.handle_of(net)


def test_a_handle_that_is_removed_leaves_another_one_alone():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 8), nn.ELU()), "b": nn.Sequential(nn.Linear(4, 8), nn.ELU())})
    whole = vk.attach(net, layers=["a.1"])
    part = vk.attach(net["b"])
    whole.remove()
    assert vk.handle_of(net["b"]) is part


def test_what_was_remembered_of_the_objective_comes_back():
    handle = vk.attach(nn.Sequential(nn.Linear(4, 8), nn.ELU()), inject=True, weight=0.3)
    steps = [4]
    handle.follow_accumulation(lambda: steps[0])
    set_back = handle.remember()
    handle.weight, handle.accumulation, handle.grad_scaler = 0.1, 2, torch.amp.GradScaler("cpu")
    set_back()
    steps[0] = 5
    assert (handle.weight, handle.accumulation, handle.grad_scaler) == (0.3, 5, None)


def test_a_step_of_another_model_leaves_the_losses_alone():
    net, other = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2)), nn.Linear(2, 2)
    handle = vk.attach(net, inject=True, shared_beta=True)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    net[1](net[0](torch.randn(10, 4)))
    (before,) = handle.losses.values()
    other(torch.randn(2, 2)).sum().backward()
    optimizer.step()
    net[1](net[0](torch.randn(10, 4)))  # adds to the first call: no step of this model came between
    (after,) = handle.losses.values()
    assert after > before

"""VCL, attach and the handle, as a training loop meets them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(64, 3))  # fmt: skip  # noqa: E501


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 8), nn.Linear(8, 5), nn.ReLU()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


X = torch.randn(20, 1, 8, 8)


def test_module_is_the_identity_and_keeps_the_loss():
    vcl, x = vk.VCL(6, weight=0.1), torch.randn(20, 6, 4)
    assert vcl(x) is x
    torch.testing.assert_close(vcl.loss, 0.1 * vk.vcl_loss(x, vcl.beta))
    kept = vcl.loss
    vcl.eval()(x)
    assert vcl.loss is kept
    vcl.train()(x[:9])
    assert vcl.loss == 0


def test_attach_loss_and_remove():
    net = network()
    before, names = net(X), list(net.state_dict())
    handle = vk.attach(net, X[:1], weight=0.5)
    torch.testing.assert_close(net(X), before)
    pre = net[0](X)
    first = vk.vcl_loss(pre, net[1].vcl[0].beta)
    second = vk.vcl_loss(net[2](pre.relu()), net[3].vcl[0].beta)
    torch.testing.assert_close(handle.loss(), 0.5 * (first + second))
    assert list(handle.losses) == ["1", "3"]
    torch.testing.assert_close(sum(handle.losses.values()), handle.loss().detach())
    handle.loss().backward()
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())
    assert [n for n in net.state_dict() if "vcl" not in n] == names
    handle.remove()
    assert list(net.state_dict()) == names
    assert net[1].inplace
    torch.testing.assert_close(net(X), before)


def test_evaluation_leaves_nothing_behind():
    net = network()
    handle = vk.attach(net, X[:1])
    net(X)
    loss = handle.loss()
    net.eval()(torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(handle.loss(), loss)
    net.train()(X)
    torch.testing.assert_close(handle.loss(), loss)


def test_the_handle_names_its_places():
    assert repr(vk.attach(nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Sequential(nn.Tanh())))) == "VCLHandle(1, 2.0)"


def test_inject_equals_adding_the_loss():
    plain, injected = network(), network()
    a, b = vk.attach(plain, X[:1], weight=0.3), vk.attach(injected, X[:1], weight=0.3, inject=True)
    (plain(X).square().mean() + a.loss()).backward()
    injected(X).square().mean().backward()
    for p, q in zip(plain.parameters(), injected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert not b.loss().requires_grad


def test_inject_under_a_grad_scaler():
    plain, injected = network(), network()
    a, b = vk.attach(plain, X[:1], weight=0.3), vk.attach(injected, X[:1], weight=0.3, inject=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    b.grad_scaler = scaler
    (plain(X).square().mean() + a.loss()).backward()
    scaler.scale(injected(X).square().mean()).backward()
    for p, q in zip(plain.parameters(), injected.parameters(), strict=True):
        torch.testing.assert_close(p.grad * 1024, q.grad)


def test_shared_activation_has_a_beta_for_each_call():
    net = Shared()
    handle = vk.attach(net, torch.randn(2, 4))
    net(torch.randn(20, 4))
    assert [tuple(p.shape) for p in handle.parameters()] == [(8,), (5,)]
    assert list(handle.losses) == ["act", "act:1"]
    handle.remove()
    vk.attach(net)
    with pytest.raises(RuntimeError, match="ReLU is called 2 times in one forward, and has VCL for 1.*example_input"):
        net(torch.randn(20, 4))


@pytest.mark.parametrize("inject", [False, True])
def test_a_call_that_the_example_did_not_make_is_an_error(inject):
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x, steps=2):
            for _ in range(steps):
                x = self.act(self.linear(x))
            return x

    net = Repeated()
    vk.attach(net, torch.randn(2, 4), inject=inject)
    net(torch.randn(20, 4))
    with pytest.raises(RuntimeError, match="Tanh is called 3 times in one forward, and has VCL for 2"):
        net(torch.randn(20, 4), 4)


def test_a_loss_without_a_graph_is_an_error():
    net = network()
    handle = vk.attach(net, X[:1], weight=1.0)
    y = checkpoint(net, X.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="ran without grad mode.*use_reentrant=False"):
        handle.loss()
    y.sum().backward()
    with torch.no_grad():
        net(X)
        assert handle.loss() > 0
    assert all(value > 0 for value in handle.losses.values())


@pytest.mark.parametrize("inject", [False, True])
def test_a_short_batch_gives_every_beta_a_gradient_of_zero(inject):
    net = network()
    handle = vk.attach(net, X[:1], inject=inject)
    loss = net(X[:6]).sum() + (0 if inject else handle.loss())
    loss.backward()  # DistributedDataParallel waits for the gradient of each parameter
    assert all(torch.equal(beta.grad, torch.zeros_like(beta)) for beta in handle.parameters())


def test_layers_that_cannot_have_a_vcl_are_named():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="container; '0' is one"):
        vk.attach(net, layers=["0"])
    net[1].vcl = 3
    with pytest.raises(ValueError, match="'1' has an attribute 'vcl' already"):
        vk.attach(net, layers=["1"])
    assert net[1].vcl == 3


def test_an_activation_called_by_keyword_has_its_loss():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.Mish()

        def forward(self, x):
            return self.act(input=self.linear(x))

    net, x = ByKeyword(), torch.randn(20, 4)
    handle = vk.attach(net, x[:1], weight=1.0)
    net(x)
    torch.testing.assert_close(handle.loss(), vk.vcl_loss(net.linear(x), torch.ones(4)))


def test_a_state_without_shapes_is_saved_and_loaded():
    first, second = network(), network()
    vk.attach(first), vk.attach(second)
    second.load_state_dict(first.state_dict())
    first(X)
    second.load_state_dict(first.state_dict())
    assert [p.shape for p in second.parameters()] == [p.shape for p in first.parameters()]


def test_no_bias_is_decayed():
    decayed, free = vk.param_groups(nn.ModuleList([nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)]), 0.1)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}


@pytest.mark.parametrize("inject", [False, True])
def test_checkpoint_counts_the_loss_once(inject):
    results = []
    for recompute in (False, True):
        net = network()
        handle = vk.attach(net, X[:1], weight=1.0, inject=inject)
        x = X.clone().requires_grad_()
        body = nn.Sequential(*net[:4])
        y = checkpoint(body, x, use_reentrant=False) if recompute else body(x)
        loss = y.square().mean()
        (loss if inject else loss + handle.loss()).backward()
        results.append([p.grad for p in net[:4].parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_copies_pickles_and_lazy_betas():
    net = network()
    handle = vk.attach(net)
    net(X)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[1].vcl[0].loss is None
        other(X)
        torch.testing.assert_close(other[1].vcl[0].loss, net[1].vcl[0].loss)
    fresh = network()
    vk.attach(fresh)
    fresh.load_state_dict(net.state_dict())
    assert fresh[1].vcl[0].beta.shape == (6,)
    assert len(list(handle.parameters())) == 2


def test_short_batch_and_skipped_layers():
    net = network()
    handle = vk.attach(net, X[:1])
    net(X[:7])
    assert handle.loss() == 0
    (net(X[:7]).mean() + handle.loss()).backward()


def test_layers_and_errors():
    net = network()
    handle = vk.attach(net, X[:1], layers=["2", net[5]])
    net(X)
    assert list(handle.losses) == ["2", "5"]
    with pytest.raises(ValueError, match="attached already"):
        vk.attach(net)
    handle.remove()
    with pytest.raises(RuntimeError, match="training forward"):
        vk.attach(net, X[:1]).loss()
    with pytest.raises(ValueError, match="layers must name modules.*'nine'"):
        vk.attach(network(), layers=["nine"])
    with pytest.raises(ValueError, match="no activation modules"):
        vk.attach(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="form must be"):
        vk.attach(network(), form="wrong")


def test_param_groups():
    net = network()
    vk.attach(net, X[:1])
    decayed, free = vk.param_groups(net, 1e-4)
    assert decayed["weight_decay"] == 1e-4
    assert free["weight_decay"] == 0
    assert len(decayed["params"]) == 3
    assert len(free["params"]) == 5
    torch.optim.SGD([decayed, free], lr=0.1)


def test_autocast():
    net = network()
    handle = vk.attach(net, X[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(X)
    assert handle.loss().dtype == torch.float32
    (out.float().mean() + handle.loss()).backward()
    assert net[0].weight.grad.isfinite().all()


@pytest.mark.parametrize(("form", "asked", "rows", "present"), [("ratio", 6, 40, 6), ("ratio", 1000, 33, 6), ("variance", 3, 40, 3)])  # fmt: skip  # noqa: E501
def test_sub_batches_are_those_asked_for_as_far_as_the_batch_has_them(form, asked, rows, present):
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ELU()), torch.randn(rows, 4)
    handle = vk.attach(net, x, form=form, num_sub_batches=asked)
    net(x)
    expected = vk.vcl_loss(net[0](x), form=form, num_sub_batches=present)
    torch.testing.assert_close(handle.loss(), 0.01 * expected)

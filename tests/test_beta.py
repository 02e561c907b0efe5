"""A beta that fits the variance of its layer: one that follows it, and one that starts at that of an example."""

import copy
import math

import pytest
import torch
from common import LEARNED, Model
from torch import nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk
from vcl_kernels.scale import variance_over_beta

pytestmark = pytest.mark.usefixtures("one_thread")


X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def running(**settings):
    return vk.VCL(beta_mode="running", **{"unit": "activation", "num_sub_batches": 2, **settings})


def fits(x, n, unit="activation", pairs=1):
    """The beta that asks for the variance of x, written out."""
    rows = x[: 2 * n * pairs].unflatten(0, (2 * pairs, n))
    var = rows.var(1) if unit == "activation" else rows.transpose(1, 2).flatten(2).var(2)
    return var.mean() / variance_over_beta(n if unit == "activation" else n * x[0, 0].numel())


@pytest.mark.parametrize(("unit", "pairs"), [("channel", 1), ("activation", 1), ("activation", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_a_running_mean_of_the_beta_that_fits(unit, pairs, dtype):
    vcl = running(unit=unit, sub_batch_size=4, num_sub_batches=2 * pairs, beta_momentum=0.2)
    expected = None
    for scale in (3.0, 5.0, 1.0):
        x = (scale * torch.randn(30, 3, 2, 2)).to(dtype)
        now = fits(x.double(), 4, unit, pairs)
        expected = now if expected is None else 0.8 * expected + 0.2 * now
        vcl(x)
        torch.testing.assert_close(vcl.beta.double(), expected, rtol=1e-5, atol=0)
        settings = {"sub_batch_size": 4, "unit": unit, "num_sub_batches": 2 * pairs}
        torch.testing.assert_close(vcl.loss, vk.vcl_loss(x, vcl.beta.to(vcl.loss), **settings))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_does_not_matter_what_scale_the_values_have(scale):
    vcl = running(beta_min=1e-12)
    x = torch.randn(20, 4, dtype=torch.float64)
    losses = []
    for factor in (1.0, scale):
        vcl.reset_parameters()
        vcl(factor * x)
        losses.append(vcl.loss)
    torch.testing.assert_close(*losses)


def test_where_it_stands_still():
    vcl, x = running(), torch.randn(20, 4)
    with pytest.warns(vk.VCLWarning, match="beta does not move"):
        vcl(torch.randn(3, 4))  # too few rows for a loss, and no value yet
    assert vcl.loss == 0
    assert vcl.beta.isnan()
    vcl(x)
    before = vcl.beta.clone()
    vcl.eval()(9 * x)
    vcl.train()(9 * x[:3])
    assert torch.equal(vcl.beta, before)
    net = nn.Sequential(nn.Linear(4, 4), nn.ELU())
    handle = vk.attach(net, x, beta_mode="running")
    with handle.paused():
        net(x)
    assert handle.layers["1"].beta.isnan()


def test_it_is_no_parameter_and_is_saved_and_resumed():
    net = nn.Sequential(nn.Linear(4, 4), nn.ELU())
    plain = copy.deepcopy(net)
    handle = vk.attach(net, torch.randn(2, 4), beta_mode="running")
    assert list(handle.parameters()) == []
    net(torch.randn(20, 4))
    state = net.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.vcl.0.beta"]
    other = copy.deepcopy(plain)
    resumed = vk.attach(other, torch.randn(2, 4), beta_mode="running")
    other.load_state_dict(state)
    x = torch.randn(20, 4)
    results = []
    for model, of in ((net, handle), (other, resumed)):
        model(x)
        results.append((of.loss(), of.layers["1"].beta))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    plain.load_state_dict(vk.plain_state_dict(state))
    copied = copy.deepcopy(net)
    assert torch.equal(vk.handle_of(copied).layers["1"].beta, handle.layers["1"].beta)
    handle.layers["1"].reset_parameters()
    assert handle.layers["1"].beta.isnan()


def test_it_stays_in_float32_and_moves_with_the_model():
    vcl = running().to(torch.bfloat16)
    assert vcl.beta.dtype == torch.float32
    assert vcl.to("meta").beta.is_meta
    assert running()(torch.randn(20, 4, device="meta")).is_meta


@pytest.mark.parametrize("kind", ["old", "new"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_neither_moves_it_twice_nor_sees_another_value(kind, whole):
    torch.manual_seed(1)
    part = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
    net = Model(lambda self, x: self.rest(self.run(x)), part=part, rest=nn.Linear(2, 2), run=part)
    handle = vk.attach(net, torch.randn(20, 4), weight=1.0, beta_mode="running", inject=True)

    def again(module, x):
        return checkpoint(module, x, use_reentrant=kind == "old")

    x, results = torch.randn(20, 4, requires_grad=True), []
    for checkpointed in (False, True):
        handle.layers["part.1"].reset_parameters()
        for scale in (1.0, 4.0):  # the second moves it from the first
            net.zero_grad()
            net.__dict__["run"] = lambda x, on=checkpointed and not whole: again(part, x) if on else part(x)
            y = again(net, scale * x) if checkpointed and whole else net(scale * x)
            y.square().mean().backward()
        results.append([handle.layers["part.1"].beta.clone(), *(p.grad.clone() for p in part.parameters())])
    torch.testing.assert_close(*results)


def test_two_forwards_before_one_backward():
    vcl, x = running(), torch.randn(20, 4, requires_grad=True)
    losses, betas = [], []
    for scale in (1.0, 3.0):
        vcl(scale * x)
        losses.append(vcl.loss)
        betas.append(vcl.beta.clone())
    (found,) = torch.autograd.grad(sum(losses), x)
    alone = sum(vk.vcl_loss(s * x, b, unit="activation") for s, b in zip((1.0, 3.0), betas, strict=True))
    torch.testing.assert_close(found, *torch.autograd.grad(alone, x))


@pytest.mark.parametrize("unit", ["channel", "activation"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_is_the_same(unit):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
        handle = vk.attach(net, torch.randn(20, 4), beta_mode="running", unit=unit, inject=True)
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        for rows in (20, 24, 30):
            run(torch.randn(rows, 4)).square().mean().backward()
        results.append([handle.layers["1"].beta, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("inject", [True, False])
def test_distributed(inject):
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    handle = vk.attach(net, torch.randn(2, 4), beta_mode="running", unit="activation", inject=inject)
    parallel, alone = nn.parallel.DistributedDataParallel(net, static_graph=not inject), copy.deepcopy(net)
    for _ in range(2):
        x = torch.randn(20, 4)
        for model in (parallel, alone):
            y = model(x).square().mean()
            (y if inject else y + vk.handle_of(model).loss()).backward()
    torch.testing.assert_close(handle.layers["1"].beta, vk.handle_of(alone).layers["1"].beta)
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in alone.parameters()])


def test_in_a_transform_it_follows_and_stays():
    vcl, x = running(), torch.randn(3, 20, 4)
    vcl(x[0])
    before = vcl.beta.clone()

    def loss(x):
        vcl(x)
        return vcl.loss

    together = torch.func.vmap(loss)(x)
    torch.testing.assert_close(together, torch.stack([vk.vcl_loss(a, vcl.followed(a), unit="activation") for a in x]))
    assert torch.equal(vcl.beta, before)


def test_the_monitor_shows_the_one_that_acted():
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 1))
    handle = vk.attach(net, torch.randn(2, 4), unit="activation", beta_mode="running")
    with vk.VCLMonitor(net, every=1) as monitor:
        for scale in (1.0, 5.0):
            (net(scale * torch.randn(20, 4)).mean() + handle.loss()).backward()
            torch.testing.assert_close(monitor.flush()[-1]["beta"], float(handle.layers["1"].beta))
    assert monitor.rows[-1]["scale"] == pytest.approx(variance_over_beta(5) * float(handle.layers["1"].beta))
    assert math.isfinite(monitor.rows[-1]["share"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta_mode": "running", "form": "relative_variance"}, 'is for form="ratio"'),
        ({"beta_mode": "learned", "form": "variance"}, "has no beta"),
        ({"beta_mode": "moving"}, "beta_mode must be one of 'learned', 'fixed', 'running'; got 'moving'"),
        ({"beta_mode": "running", "beta_init": 2.0}, "beta_init"),
        ({"beta_mode": "running", "beta_momentum": 0.0}, "beta_momentum"),
        ({"beta_mode": "learned", "beta_momentum": 0.5}, "beta_momentum"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(ValueError, match=said):
        vk.VCL(4, **settings)


@pytest.mark.parametrize("unit", ["channel", "activation"])
@pytest.mark.parametrize("inplace", [False, True])
def test_it_starts_at_that_of_the_example(unit, inplace):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.Mish())
    x, before = 3 * torch.randn(20, 1, 8, 8), []
    hooks = [net[i].register_forward_hook(lambda *args: before.append(args[2].clone())) for i in (0, 2)]
    handle = vk.attach(net, x, beta_init="example", sub_batch_size=4, **{**LEARNED, "unit": unit})
    del before[2:]  # later runs of the example
    for vcl, values in zip(handle.layers.values(), before, strict=True):
        expected = fits(values, 4, unit).expand(vcl.beta.shape)
        torch.testing.assert_close(vcl.beta.detach(), expected)
        with torch.no_grad():
            vcl.beta.zero_()
        vcl.reset_parameters()
        torch.testing.assert_close(vcl.beta.detach(), expected)
    for hook in hooks:
        hook.remove()


def test_channels_of_the_example_may_be_last():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ELU()), torch.randn(12, 7, 4)
    handle = vk.attach(net, x, beta_init="example", sub_batch_size=3, **{**LEARNED, "beta_mode": "fixed"})
    assert handle.layers["1"].beta_init == pytest.approx(float(fits(net[0](x).detach().transpose(1, 2), 3, "channel")))


@pytest.mark.parametrize(
    ("example", "settings", "said"),
    [
        (None, {}, "got no example_input, form='ratio', beta_mode='learned'"),
        (20, {"beta_mode": "running"}, "got an example_input, form='ratio', beta_mode='running'"),
        (20, {"form": "relative_variance"}, "form='relative_variance'"),
        (9, {}, r"at least 2 \* sub_batch_size = 10 rows in layer '1'; got 9"),
    ],
)
def test_examples_that_say_nothing(example, settings, said):
    net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    with pytest.raises(ValueError, match=said):
        vk.attach(net, example and torch.randn(example, 4), beta_init="example", **{**LEARNED, **settings})
    assert not hasattr(net, "vcl_handle")


def test_an_example_has_to_reach_every_layer():
    net = Model(lambda self, x: self.a(x), a=nn.Sequential(nn.Linear(4, 4), nn.ELU()), b=nn.ELU())
    with pytest.raises(ValueError, match="it does not reach b"):
        vk.attach(net, torch.randn(20, 4), beta_init="example", **LEARNED)


def test_relative_variance_has_the_beta_of_vcl_loss():
    vcl, x = vk.VCL(form="relative_variance"), torch.randn(20, 4)
    vcl(x)
    torch.testing.assert_close(vcl.loss, vk.vcl_loss(x, form="relative_variance"))
    assert vcl.beta is None


def test_an_example_of_which_beta_cannot_be_measured():
    still = nn.Sequential(nn.Linear(4, 4), nn.ELU())
    nn.init.zeros_(still[0].weight)
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ELU())
    for net, said in ((still, "varies in layer '1'; the beta that fits is 0.0"), (normed, "batch norm '1'")):
        with pytest.raises(ValueError, match=said):
            vk.attach(net, torch.randn(20, 4), beta_init="example")
    with pytest.raises(ValueError, match="beta_init must be a number or \"example\"; got 'exmple'"):
        vk.attach(still, torch.randn(20, 4), beta_init="exmple")
    with pytest.raises(ValueError, match="beta_init must be finite and at least 0; got -1.0"):
        vk.VCL(beta_init=-1.0)


def test_a_fixed_beta_of_an_example_is_saved_and_may_be_loaded_before_backward():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ELU()), torch.randn(20, 4)
    handle = vk.attach(net, 5 * x, beta_init="example")
    other = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    of_other = vk.attach(other, x, beta_init="example")
    other(x)
    loss = of_other.loss()
    other.load_state_dict(net.state_dict())
    loss.backward()
    assert str(of_other).splitlines()[1].split() == ["1", "ELU", "fused", f"{float(handle.layers['1'].beta):.4g}"]


def test_calls_that_share_a_beta_start_at_their_geometric_mean():
    net = Model(lambda self, x: self.act(100 * self.act(self.a(x))), a=nn.Linear(4, 4), act=nn.ELU())
    each = vk.attach(net, X, beta_init="example")
    betas = [vcl.beta_init for vcl in each.layers.values()]
    each.remove()
    (vcl,) = vk.attach(net, X, beta_init="example", shared_beta=True).layers.values()
    assert vcl.beta_init == pytest.approx(math.sqrt(math.prod(betas)))


@pytest.mark.parametrize(
    ("saved", "loading", "said"),
    [
        ({"beta_mode": "learned"}, {}, "this one is not saved"),
        ({"beta_mode": "running"}, {"beta_init": "example"}, "is not finite"),
        ({"beta_init": "example"}, {"beta_mode": "learned"}, "one for each unit"),
    ],
)
def test_a_checkpoint_of_another_beta_is_refused(saved, loading, said):
    nets = [nn.Sequential(nn.Linear(4, 8), nn.ELU()) for _ in range(2)]
    vk.attach(nets[0], X, **saved)
    vk.attach(nets[1], X if "beta_init" in loading else None, **loading)
    with pytest.raises(RuntimeError, match=said):
        nets[1].load_state_dict(nets[0].state_dict())


def test_an_infinite_batch_does_not_stay():
    vcl = running()
    vcl(torch.full((20, 4), 3e38).mul(torch.randn(20, 1).sign()))
    assert not vcl.beta.isfinite()
    vcl(X)
    torch.testing.assert_close(vcl.beta, fits(X, 5))

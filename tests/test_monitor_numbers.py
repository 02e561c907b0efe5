"""What the monitor shows of VCL: its share of the gradient, and the variance that beta asks for."""

import math
from types import SimpleNamespace

import pytest
import torch
from common import LEARNED
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import vcl_kernels as vk
from vcl_kernels.nn.statistics import acting_beta, is_sharded
from vcl_kernels.scale import variance_over_beta


@pytest.mark.parametrize(("unit", "M"), [("channel", 5 * 16), ("activation", 5)])
def test_scale_is_what_the_vcl_asks_for(unit, M):
    """M is that of the layer's VCL, whatever the monitor was asked to cut."""
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ELU()), torch.randn(20, 2, 6, 6)
    handle = vk.attach(model, x, **{**LEARNED, "unit": unit})
    (beta,) = handle.parameters()
    with torch.no_grad():
        beta.uniform_(-1, 2)
    with vk.VCLMonitor(handle, sub_batch_size=4, unit="channel") as monitor:
        model(x)
    (row,) = monitor.rows
    assert row["scale"] == pytest.approx(float(beta.detach().clamp(min=1e-3).mean()) * variance_over_beta(M), rel=1e-5)


@pytest.mark.parametrize("form", ["variance", "relative_variance"])
def test_other_forms_ask_for_no_scale(form):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ELU()), torch.randn(20, 4)
    with vk.VCLMonitor(vk.attach(model, x, form=form)) as monitor:
        model(x)
    assert math.isnan(monitor.rows[0]["scale"])
    assert not math.isnan(monitor.rows[0]["loss"])


# share


def network(form="ratio", **options):
    model = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 8), nn.Mish(), nn.Linear(8, 2)).double()
    x = torch.randn(23, 4, dtype=torch.float64)
    settings = {**LEARNED, "weight": 0.3, "form": form}
    if form == "variance":
        settings["beta_mode"] = "fixed"
    if form != "ratio":
        settings["num_sub_batches"] = None
    handle = vk.attach(model, x, **{**settings, **options})
    with torch.no_grad():
        for beta in handle.parameters():
            beta.data = torch.rand_like(beta, dtype=torch.float64) - 0.2
    handle.layers["1"].weight = 0.5
    return model, handle, x


def gradients(model, names, behind=()):
    """A dictionary that gets the input of each layer, with its gradient after a backward pass."""
    inputs = {name: [] for name in names}

    def keep(name, x):
        if x.requires_grad:
            x.retain_grad()
        inputs[name].append(x)

    for name in names:
        module = model.get_submodule(name)
        if name in behind:
            module.register_forward_hook(lambda _m, _a, y, name=name: keep(name, y), prepend=True)
        else:
            module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args[0]), prepend=True)
    return inputs


def by_hand(x, vcl, upstream):
    """The share, of a gradient that autograd kept."""
    seen = x.detach().double().requires_grad_()
    view = seen if vcl.channel_dim == 1 else seen.movedim(vcl.channel_dim, 1)
    beta = None
    if vcl.form != "variance":
        beta = vcl.beta_init if vcl.beta is None else vcl.beta.detach().double().clamp(min=vcl.beta_min)
    settings = {"sub_batch_size": vcl.sub_batch_size, "form": vcl.form, "unit": vcl.unit}
    loss = vk.reference.vcl_loss(view, beta, num_sub_batches=vcl.num_sub_batches, **settings)
    own = torch.autograd.grad(loss, seen)[0] * upstream * vcl.weight * vcl.steering.weight
    return float(own.norm() / (own.norm() + (x.grad.double() - own).norm()))


def shares(monitor):
    return [row["share"] for row in monitor.flush()]


@pytest.mark.parametrize("unit", ["channel", "activation"])
@pytest.mark.parametrize(
    ("form", "options"), [("ratio", {}), ("ratio", {"num_sub_batches": 4}), ("variance", {}), ("relative_variance", {})]
)
@pytest.mark.parametrize("inject", [False, True])
def test_share_is_that_of_autograd(inject, form, options, unit):
    model, handle, x = network(form=form, unit=unit, inject=inject, **options)
    inputs, monitor = gradients(model, ("1", "3")), vk.VCLMonitor(handle)
    objective = model(x).square().mean()
    (objective if inject else objective + 0.7 * handle.loss()).backward()
    found = shares(monitor)
    wanted = [by_hand(inputs[name][0], vcl, 1.0 if inject else 0.7) for name, vcl in handle.layers.items()]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert all(0 < share < 1 for share in wanted)


@pytest.mark.parametrize("inject", [False, True])
def test_share_under_a_scaler_with_accumulation(inject):
    """Both scale the whole gradient, so that the share is that without them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, handle, x = network(inject=inject)
    if inject:
        handle.grad_scaler, handle.accumulation = scaler, 2
    inputs, monitor = gradients(model, ("1", "3")), vk.VCLMonitor(handle)
    for _ in range(2):
        objective = model(x).square().mean() + (0 if inject else handle.loss())
        scaler.scale(objective / 2).backward()
    wanted = [by_hand(inputs[n][step], vcl, 512.0) for step in range(2) for n, vcl in handle.layers.items()]
    assert shares(monitor) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("in_place", [False, True])
def test_share_of_a_module_of_the_users_own(in_place, channel_dim):
    """A later in-place activation overwrites its input."""
    vcl = vk.VCL(weight=2.0, channel_dim=channel_dim, beta_init=0.3, **{**LEARNED, "beta_mode": "fixed"})
    model = nn.Sequential(nn.Linear(4, 8), vcl, nn.Hardtanh(0, 1, inplace=in_place), nn.Linear(8, 2)).double()
    x = torch.randn(20, 7, 4, dtype=torch.float64)
    seen = []
    model[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))
    model[1].register_forward_pre_hook(lambda _m, args: args[0].register_hook(arrived.append) and None)
    arrived, monitor = [], vk.VCLMonitor(model)
    y = model(x).sin().mean()
    (y + vcl.loss).backward()
    pre = SimpleNamespace(detach=seen[0].detach, grad=arrived[0])
    assert shares(monitor)[0] == pytest.approx(by_hand(pre, vcl, 1.0), rel=1e-9)


@pytest.mark.parametrize("inject", [False, True])
def test_share_and_statistics_behind_a_layer(inject):
    """``after=`` gives VCL to an output: that is what is looked at."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 2)).double(), torch.randn(20, 4).double()
    handle = vk.attach(model, x, layers=[], after=["0"], weight=0.5, inject=inject, **LEARNED)
    inputs, monitor = gradients(model, ("0",), behind=("0",)), vk.VCLMonitor(handle)
    objective = model(x).square().mean()
    (objective if inject else objective + handle.loss()).backward()
    row = monitor.flush()[0]
    assert row["layer"] == "0"
    assert row["share"] == pytest.approx(by_hand(inputs["0"][0], handle.layers["0"], 1.0), rel=1e-6)
    variance = vk.sub_batch_moments(model[0](x).detach(), 5)[1].mean()
    assert row["variance"] == pytest.approx(float(variance))


@pytest.mark.parametrize("shared_beta", [False, True])
def test_share_of_each_call(shared_beta):
    act, x = nn.ELU(), torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(act, nn.Linear(4, 4), act, nn.Linear(4, 2)).double()
    handle = vk.attach(model, x.detach(), weight=0.4, shared_beta=shared_beta, **LEARNED)
    inputs, monitor = gradients(model, ("0",)), vk.VCLMonitor(model)
    (model(x).square().mean() + handle.loss()).backward()
    vcls = list(handle.layers.values()) * (2 if shared_beta else 1)
    rows = monitor.flush()
    assert [row["layer"] for row in rows] == ["0", "0:1"]
    assert [row["share"] for row in rows] == pytest.approx(
        [by_hand(x, vcl, 1.0) for x, vcl in zip(inputs["0"], vcls, strict=True)], rel=1e-6
    )
    wanted = [0.4 * float(vk.reference.vcl_loss(x.detach(), 1.0)) for x in inputs["0"]]
    assert [row["loss"] for row in rows] == pytest.approx(wanted)


class Centred(nn.Module):
    """Uses operations that the monitor uses too."""

    def forward(self, x):
        return x - x.mean([0], keepdim=True)


class Parts(nn.Module):
    """Its rest may be run again in backward."""

    def __init__(self, model, options):
        super().__init__()
        self.first, self.rest, self.options = model[0], nn.Sequential(*model[1:4], Centred(), model[4]), options

    def forward(self, x):
        x = self.first(x)
        return self.rest(x) if self.options is None else checkpoint(self.rest, x, **self.options)


@pytest.mark.parametrize("context", ["plain", "selective"])
@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_share_under_checkpointing_is_that_without(whole, inject, context):
    options = {"use_reentrant": False}
    if context == "selective":
        aten = torch.ops.aten
        saved = [aten.mm.default, aten.addmm.default, aten.mean.dim, aten.pow.Tensor_Scalar, aten.sub.Tensor]
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(saved)
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(1)
        model, _, x = network(inject=inject)
        net = Parts(model, options if checkpoints and not whole else None)
        monitor = vk.VCLMonitor(net)
        y = checkpoint(net, x, **options) if checkpoints and whole else net(x)
        (y.square().mean() + (0 if inject else losses(net))).backward()
        found.append([monitor.step, *shares(monitor), *(p.grad.norm().item() for p in net.parameters())])
    assert len(found[0]) > 4
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_vcl_is_unknown_under_reentrant_checkpointing():
    """It runs in the recomputation."""
    model, _, x = network(inject=True)
    net = Parts(model, {"use_reentrant": True})
    monitor = vk.VCLMonitor(net)
    net(x).mean().backward()
    rows = monitor.flush()
    assert [row["layer"] for row in rows] == ["rest.0", "rest.2"]
    assert all(math.isnan(row["share"]) for row in rows)
    assert not any(math.isnan(row["variance"]) for row in rows)


def losses(net):
    return sum(vcl.loss for vcl in net.modules() if isinstance(vcl, vk.VCLActivation) and vcl.loss is not None)


def test_share_says_when_the_loss_is_not_in_the_objective():
    model, handle, x = network()
    monitor = vk.VCLMonitor(handle)
    model(x)
    assert all(map(math.isnan, shares(monitor)))  # no backward
    model(x).mean().backward()
    assert shares(monitor) == [0, 0]
    (model(x).mean() + 0 * handle.loss()).backward()
    assert shares(monitor) == [0, 0]
    with handle.paused():
        model(x).mean().backward()
    assert all(map(math.isnan, shares(monitor)))
    objective = model(x).mean() + handle.loss()
    for _ in range(2):
        objective.backward(retain_graph=True)
    assert all(map(math.isnan, shares(monitor)))
    model(x)
    handle.loss().backward()
    assert shares(monitor)[1] == pytest.approx(1)  # the last layer gets nothing else
    (model(x[:7]).mean() + handle.loss()).backward()
    assert shares(monitor) == [0, 0]  # too short for a loss


def test_share_in_half_precision_does_not_underflow():
    model = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 2)).half()
    x = torch.randn(20, 4).half()
    handle = vk.attach(model, x, weight=1e-6, **LEARNED)
    monitor = vk.VCLMonitor(handle)
    (model(x).float().square().mean() * 1e-2 + handle.loss()).backward()
    (share,) = shares(monitor)
    assert 0 < share < 0.1


def test_paused_and_frozen_layers_have_no_numbers_of_vcl():
    model, handle, x = network()
    monitor = vk.VCLMonitor(handle)
    model(x)
    with handle.paused():  # the loss of the forward before can still be read
        model(x)
    rows = monitor.flush()
    assert [math.isnan(row["loss"]) for row in rows] == [False, False, True, True]
    assert not any(math.isnan(row["variance"]) for row in rows)
    model[0].requires_grad_(False)
    model(x)
    assert [math.isnan(row["beta"]) for row in monitor.flush()] == [True, False]


@pytest.mark.usefixtures("one_process")
def test_sharded_betas_are_read_where_they_are_gathered():
    """In the forward of what FSDP2 gathers they are plain tensors; elsewhere none, for processes would communicate."""
    from torch.distributed import fsdp, init_device_mesh

    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ELU()), nn.Linear(8, 2)), torch.randn(20, 4)
    handle = vk.attach(model, x, beta_init=0.5, **LEARNED)
    for part in (model[0], model):
        fsdp.fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    monitor = vk.VCLMonitor(handle)
    (model(x).mean() + handle.loss()).backward()
    (row,) = monitor.flush()
    assert monitor.skipped == {}
    assert row["beta"] == 0.5
    assert 0 < row["share"] < 1
    (vcl,) = handle.layers.values()
    model[0].reshard()
    assert is_sharded(vcl.beta)
    assert acting_beta(vcl, x, x) is None

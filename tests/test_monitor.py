"""The monitor: its numbers against their definitions, what it leaves alone, and where it writes."""

import copy
import math
import pickle
import threading
from unittest import mock

import pytest
import torch
from common import LEARNED
from torch import nn
from torch.utils.checkpoint import checkpoint
from watched import close, hooks, net

import vcl_kernels as vk
from vcl_kernels.nn import look, statistics, undo
from vcl_kernels.nn.rows import read_csv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("unit", ["channel", "activation"])
def test_numbers_are_those_of_the_definitions(unit, dtype):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU()).to(dtype)
    x = torch.randn(14, 2, 6, 6, dtype=dtype)
    with vk.VCLMonitor(model, sub_batch_size=4, unit=unit) as monitor:
        model(x)
    (row,) = monitor.rows
    seen = model[0](x).detach().double()
    units = seen.transpose(0, 1).flatten(1) if unit == "channel" else seen.flatten(1).T
    cut = seen[:12].unflatten(0, (3, 4))
    var = cut.var((1, 3, 4)) if unit == "channel" else cut.var(1).flatten(1)
    mean = var.mean(0)
    centred = units - units.mean(1, keepdim=True)
    assert row["variance"] == close(mean.mean())
    assert row["constancy"] == close((((var - mean) ** 2).sum(0) / 2 / mean**2).mean())
    assert row["kurtosis"] == close((centred.pow(4).mean(1) / centred.square().mean(1) ** 2).mean())
    assert all(math.isnan(row[name]) for name in ("loss", "beta", "beta_least"))


@pytest.mark.parametrize("form", ["ratio", "variance", "relative_variance"])
def test_an_attached_model_shows_its_losses_and_betas(form):
    model, x = net(), torch.randn(32, 4)
    beta_mode = "fixed" if form == "variance" else "learned"
    handle = vk.attach(model, x, form=form, beta_mode=beta_mode, beta_init=0.5, unit="channel", inject=form == "ratio")
    with torch.no_grad():
        for beta in handle.parameters():
            beta[0] = -1.0
    with vk.VCLMonitor(handle) as monitor:
        model(x)
    assert [row["layer"] for row in monitor.rows] == ["1", "4"] == list(handle.losses)
    for row, loss, units in zip(monitor.rows, handle.losses.values(), (8, 6), strict=True):
        assert row["loss"] == close(float(loss))
        if form == "variance":
            assert math.isnan(row["beta"])
        else:
            assert row["beta"] == close((0.5 * (units - 1) + 1e-3) / units)
            assert row["beta_least"] == close(1e-3)


@pytest.mark.parametrize("beta_mode", ["learned", "fixed"])
def test_vcl_modules_of_the_users_own_are_seen(beta_mode):
    vcl = vk.VCL(weight=0.5, beta_init=2.0, beta_mode=beta_mode)
    model = nn.Sequential(nn.Linear(4, 8), vcl, nn.Linear(8, 2))
    with vk.VCLMonitor(model) as monitor:
        model(torch.randn(20, 4))
    (row,) = monitor.rows
    assert row["layer"] == "1"
    assert row["loss"] == close(vcl.loss.item())
    assert row["beta"] == 2.0


def test_each_call_of_a_shared_activation_has_its_row():
    act, x = nn.ELU(), torch.randn(20, 4, requires_grad=True)
    model = nn.Sequential(act, nn.Linear(4, 4), act)
    handle = vk.attach(model, x.detach())
    with vk.VCLMonitor(model) as monitor:
        model(x)
    assert [row["layer"] for row in monitor.rows] == ["0", "0:1"]
    assert [row["loss"] for row in monitor.rows] == [close(float(loss)) for loss in handle.losses.values()]


def test_channels_are_where_the_vcl_has_them():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU()), torch.randn(20, 7, 4)
    handle = vk.attach(model, x[:1], **LEARNED)
    with vk.VCLMonitor(handle) as monitor, vk.VCLMonitor(handle, channel_dim=1) as other:
        model(x)
    for watched, pre in ((monitor, model[0](x).detach().mT), (other, model[0](x).detach())):
        assert watched.rows[0]["variance"] == close(vk.sub_batch_moments(pre, 5)[1].mean())


def test_gradients_and_outputs_are_untouched():
    x, plain = torch.randn(32, 4), net()
    watched, results = copy.deepcopy(plain), []
    monitor = vk.VCLMonitor(watched)
    for model in (plain, watched):
        handle = vk.attach(model, x)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().mean() + handle.loss(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(monitor.flush()) == 2


def test_only_every_nth_training_forward_is_looked_at_and_others_have_one_hook():
    model, x = net(), torch.randn(32, 4)
    bare = hooks(model)
    monitor = vk.VCLMonitor(model, every=3)
    assert hooks(model) == bare + 2  # the model's own: one that counts, one that ends
    with mock.patch.object(statistics, "sub_batch_moments", wraps=vk.sub_batch_moments) as moments:
        for _ in range(7):
            model(x)
            assert hooks(model) == bare + 2
            model.eval()(x)
            model.train()
    assert moments.call_count == 3 * 2
    monitor.flush()
    assert [row["step"] for row in monitor.rows] == [0, 0, 3, 3, 6, 6]
    monitor.remove()
    assert hooks(model) == bare
    model(x)
    assert monitor.flush() == []


def test_an_error_in_the_model_leaves_no_layer_hooks():
    model = net()
    monitor = vk.VCLMonitor(model)
    bare = hooks(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(32, 3))
    assert hooks(model) == bare
    model(torch.randn(32, 4))
    assert [row["step"] for row in monitor.flush()] == [1, 1]


def test_the_training_path_fetches_nothing(monkeypatch):
    """On the meta device nothing can be read: an attempt would be in ``skipped``. The flush is the first."""
    with torch.device("meta"):
        model, x = net(), torch.empty(32, 4)
        handle = vk.attach(model, x)
    monitor = vk.VCLMonitor(handle)
    with monkeypatch.context() as looking:
        looking.setattr(look, "why_not", lambda _: None)
        (model(x).mean() + handle.loss()).backward()
    assert monitor.skipped == {}
    with pytest.warns(vk.VCLWarning, match="NotImplementedError"):
        monitor.flush()
    (model(x).mean() + handle.loss()).backward()
    assert monitor.flush() == []
    other = vk.VCLMonitor(handle)
    with pytest.warns(vk.VCLWarning, match="on the meta device: it has no values"):
        model(x)
    assert other.flush() == []


def test_short_batches_and_dead_units():
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.0], [2.0]]))
    with vk.VCLMonitor(model, sub_batch_size=2) as monitor:
        model(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
        model(torch.tensor([[1.0], [-1.0], [1.0]]))
    whole, short = monitor.rows
    assert whole["kurtosis"] == 1.0
    assert whole["constancy"] == 0.0
    assert whole["variance"] == close((2 + 0 + 8) / 3)
    assert math.isnan(short["constancy"])


def test_a_beta_without_a_shape_has_no_value_yet():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ELU()), torch.randn(20, 4)
    with vk.VCLMonitor(vk.attach(model, **LEARNED)) as monitor:
        with pytest.warns(vk.VCLWarning, match="fewer than 2"):
            model(x[:6])
        model(x)
    assert [row["loss"] == 0 for row in monitor.rows] == [math.isnan(row["beta"]) for row in monitor.rows]
    assert [row["beta"] == 1 for row in monitor.rows] == [False, True]


# Steps


def run_twice(run, model):
    monitor = vk.VCLMonitor(model)
    for _ in range(2):
        run().mean().backward()
    return [(row["step"], row["layer"]) for row in monitor.flush()], monitor.step


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_of_the_model_is_no_step(use_reentrant):
    model, x = net(), torch.randn(20, 4, requires_grad=True)
    found = run_twice(lambda: checkpoint(model, x, use_reentrant=use_reentrant), model)
    assert found == ([(0, "1"), (0, "4"), (1, "1"), (1, "4")], 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_of_a_part_is_no_record(use_reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(4, 4), net()

        def forward(self, x):
            y = checkpoint(self.rest, self.first(x), use_reentrant=use_reentrant)
            if y.requires_grad:  # a backward inside of the forward, whose layers are still looked at
                torch.autograd.grad(y.mean(), self.first.weight, retain_graph=True)
            return y

    model, x = Net(), torch.randn(20, 4, requires_grad=True)
    if use_reentrant:  # it has no autograd.grad
        model.forward = lambda x: checkpoint(model.rest, model.first(x), use_reentrant=True)
    found = run_twice(lambda: model(x), model)
    assert found == ([(0, "rest.1"), (0, "rest.4"), (1, "rest.1"), (1, "rest.4")], 2)


def test_a_forward_inside_of_a_forward_is_the_same_step():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x, depth=2):
            x = self.act(self.linear(x))
            if depth < 0:
                raise ValueError(depth)
            return x if depth == 0 else self.act(self(x, depth - 1))

    model, x = Recursive(), torch.randn(20, 4)
    monitor = vk.VCLMonitor(model, every=2)
    with pytest.raises(ValueError, match="-1"):
        model(x, -1)
    for _ in range(2):
        model(x)
    found = [(row["step"], row["layer"]) for row in monitor.flush()]
    assert found == [(0, "act"), (2, "act"), *((2, f"act:{call}") for call in range(1, 5))]
    assert monitor.step == 3


def test_each_training_forward_is_a_step():
    """Of a discriminator that runs twice for each step of its optimizer, and of an evaluation between."""
    model, x = net(), torch.randn(20, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = vk.VCLMonitor(model)
    for _ in range(2):
        (model(x).mean() - model(x + 1).mean()).backward()
        optimizer.step()
        model.eval()(x)
        model.train()
    assert [row["step"] for row in monitor.flush()] == [0, 0, 1, 1, 2, 2, 3, 3]


# Layers that cannot be looked at


class Odd(nn.Module):
    """Calls its activation with something else."""

    def __init__(self, *arguments):
        super().__init__()
        self.first, self.odd, self.arguments = nn.ReLU(), Permissive(), arguments

    def forward(self, x):
        self.odd(*self.arguments)
        return self.first(x)


class Permissive(nn.ReLU):
    def forward(self, x=None):
        plain = isinstance(x, torch.Tensor) and x.is_floating_point() and x.layout is torch.strided
        return super().forward(x) if plain else x


ODD = {
    "a 1-D tensor": torch.randn(8),
    "a 0-D tensor": torch.tensor(1.0),
    "torch.int64": torch.ones(4, 3, dtype=torch.long),
    "torch.bool": torch.ones(4, 3) > 0,
    "torch.complex64": torch.ones(4, 3, dtype=torch.complex64),
    "a sparse": torch.eye(4).to_sparse(),
    "a nested": torch.nested.nested_tensor([torch.ones(2, 2)], layout=torch.jagged),
    "empty": torch.ones(0, 3),
    "type list": [torch.ones(4, 3)],
    "type NoneType": None,
}


@pytest.mark.parametrize("reason", [*ODD, "without arguments"])
def test_a_layer_that_cannot_be_looked_at_is_named_and_left_out(reason):
    model, x = Odd(*([ODD[reason]] if reason in ODD else [])), torch.randn(20, 4)
    monitor = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match=f"cannot look at layer 'odd': .*{reason}") as warned:
        model(x)
    assert len(warned) == 1
    for _ in range(2):
        model(x)  # says nothing
    assert warned[0].filename == __file__
    assert list(monitor.skipped) == ["odd"]
    assert reason in monitor.skipped["odd"]
    assert [(row["step"], row["layer"]) for row in monitor.flush()] == [(step, "first") for step in range(3)]


def test_a_forward_that_calls_no_layer_is_told():
    """As of a model whose forward replays a CUDA graph."""
    model = net()
    model.forward = lambda x: x
    monitor = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match="'Sequential': its forward calls none of its layers"):
        model(torch.randn(20, 4))
    assert list(monitor.skipped) == ["Sequential"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.trace
def test_tracing_is_left_out():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ELU()), torch.randn(20, 4)
    plain = torch.jit.trace(model, x).graph
    monitor = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match="torch.jit traces it"):
        traced = torch.jit.trace(model, x, check_trace=False).graph
    assert len(list(traced.nodes())) == len(list(plain.nodes()))
    assert monitor.flush() == []


class Replicas(nn.Module):
    """Runs a replica of a layer, as ``nn.DataParallel`` does on several devices, and a shallow copy of another."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.ELU(), nn.Mish(), nn.ReLU()

    def forward(self, x):
        first = self.first._replicate_for_data_parallel()  # noqa: SLF001
        return self.third(copy.copy(self.second)(first(x)))


@pytest.mark.parametrize("attached", [False, True])
def test_a_replica_is_left_out(attached):
    model, x = Replicas(), torch.randn(20, 4, requires_grad=True)
    if attached:
        vk.attach(nn.Sequential(model.second, model.third), x.detach(), inject=True)
    monitor = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match="cannot look at layer"):
        model(x).sum().backward()
    assert monitor.skipped == {"first": "it runs in nn.DataParallel", "second": "a copy of it runs"}
    assert [row["layer"] for row in monitor.flush()] == ["third"]


def test_a_transform_is_left_out():
    model, x = net(), torch.randn(3, 20, 4)
    del model[3]  # a batch norm counts in place
    monitor = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match="transform of torch.func"):
        torch.func.vmap(model)(x)
    model(x[0])
    assert list(monitor.skipped) == ["1", "3"]
    assert [row["step"] for row in monitor.flush()] == [1, 1]


@pytest.mark.parametrize("name", ["of_input", "acting_beta", "Share", "channels_first"])
def test_an_unforeseen_error_stops_nothing(monkeypatch, name):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ELU()), torch.randn(20, 4)
    handle = vk.attach(model, x)
    monitor = vk.VCLMonitor(handle)
    monkeypatch.setattr(look, name, mock.Mock(side_effect=OverflowError("never seen")))
    with pytest.warns(vk.VCLWarning, match="layer '1': OverflowError: never seen"):
        (model(x).mean() + handle.loss()).backward()
    assert list(monitor.skipped) == ["1"]
    monkeypatch.undo()
    (model(x).mean() + handle.loss()).backward()
    assert not any(math.isnan(value) for value in list(monitor.flush()[-1].values())[2:])


@pytest.mark.parametrize("name", ["arrive", "note_upstream"])
def test_an_unforeseen_error_in_backward_stops_nothing(monkeypatch, name):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ELU()), torch.randn(20, 4)
    handle = vk.attach(model, x)
    monitor = vk.VCLMonitor(handle)
    monkeypatch.setattr(look.Share, name, mock.Mock(side_effect=OverflowError("never seen")))
    objective = model(x).mean() + handle.loss()
    with pytest.warns(vk.VCLWarning, match="layer '1': OverflowError: never seen"):
        objective.backward()
    assert model[0].weight.grad is not None
    assert list(monitor.skipped) == ["1"]


# Nothing is lost, and nothing stays hooked


class Interrupted(nn.Module):
    """Stops behind its first activation, if asked to."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.stop = nn.ELU(), nn.ReLU(), False

    def forward(self, x):
        x = self.first(x)
        if self.stop:
            raise KeyboardInterrupt
        return self.second(x)


@pytest.mark.parametrize("then", ["training", "evaluation", "flush", "remove", "exit", "garbage"])
def test_an_interrupt_leaves_no_hooks(then, tmp_path):
    model, x, path = Interrupted(), torch.randn(20, 4), tmp_path / "run.csv"
    optimized = torch.compile(model, backend="eager")
    monitor = vk.VCLMonitor(optimized, csv=path, every=2)
    for _ in range(2):
        optimized(x)
    model.stop = True
    with pytest.raises(KeyboardInterrupt):
        optimized(x)
    model.stop = False
    assert hooks(model) == 4
    copy.deepcopy(model)(x)  # whose hooks do nothing
    ends = {"training": lambda: optimized(x), "evaluation": lambda: model.eval() and optimized(x)}
    ends |= {"flush": monitor.flush, "remove": monitor.remove, "exit": lambda: monitor.__exit__(None)}
    if then == "garbage":
        del monitor, ends
    else:
        ends[then]()
    assert hooks(model) == 0  # those of the wrapper are not among them
    assert not undo.uncompiled.looking
    if then == "garbage":
        rows = read_csv(path)
    else:
        optimized.train()(x)  # the fourth or, after training, the fifth
        monitor.flush()
        rows = monitor.rows
    found = [(int(row["step"]), row["layer"]) for row in rows]
    seen = [(0, "first"), (0, "second"), (2, "first")]
    assert found == seen + ([(4, "first"), (4, "second")] if then == "training" else [])


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (net(), {"every": 0}, ValueError, "every must be at least 1"),
        (net(), {"unit": "pixel"}, ValueError, "unit must"),
        (net(), {"sub_batch_size": 0}, ValueError, "sub_"),
        (net(), {"csv": "no/such/run.csv"}, FileNotFoundError, "csv must be in a folder that exists; got"),
        (nn.Linear(2, 2), {}, ValueError, "Linear.* has no activation"),
    ],
)
def test_errors_leave_no_hooks(model, options, error, message):
    with pytest.raises(error, match=message):
        vk.VCLMonitor(model, **options)
    assert hooks(model) == 0


def test_copies_of_a_watched_model_are_not_watched(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    monitor = vk.VCLMonitor(model, csv=tmp_path / "run.csv", tensorboard=mock.Mock(lock=threading.Lock()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(20, 4))
    assert monitor.step == 0
    model(torch.randn(20, 4))
    assert monitor.step == 1

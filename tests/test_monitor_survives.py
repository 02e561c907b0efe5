"""What the monitor must survive: removal inside of a forward, interrupts, leaves, odd tensors, other threads."""

import copy
import gc
import math
import os
import sys
import threading
import types
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from watched import hooks

import vcl_kernels as vk
from vcl_kernels import torch_private
from vcl_kernels.nn import look, undo
from vcl_kernels.nn.rows import read_csv

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 6), nn.Mish(), nn.Linear(6, 2))


def step(model, handle, x=X):
    (model(x).square().mean() + handle.loss()).backward()


def variance(x):
    return pytest.approx(float(vk.sub_batch_moments(x.detach(), 5)[1].mean()), rel=1e-4)


# What ends in the middle


@pytest.mark.parametrize("end", ["flush", "remove", "garbage"])
@pytest.mark.parametrize("where", ["1", "1.vcl.0", "3"])
def test_an_end_inside_of_a_forward_stops_nothing(end, where):
    """Torch then calls hooks that were removed, without their keyword arguments."""
    model = net()
    handle = vk.attach(model, X)
    bare = hooks(model)
    kept = [vk.VCLMonitor(model)]

    def act(module, _args):
        if module is model.get_submodule(where) and kept:
            kept.clear() if end == "garbage" else getattr(kept[0], end)()

    handle_of_hook = nn.modules.module.register_module_forward_pre_hook(act)
    try:
        step(model, handle)
    finally:
        handle_of_hook.remove()
    if end == "flush":  # what runs is flushed whole, after its end
        rows = kept[0].flush()
        assert [row["layer"] for row in rows] == ["1", "3"]
        assert not any(math.isnan(row["share"]) for row in rows)
        kept[0].remove()
    assert hooks(model) == bare
    assert not undo.uncompiled.looking


def test_a_monitor_keeps_no_model_alive():
    """A graph that holds the model is not seen by the garbage collector."""
    found = []
    for backward in (False, True):
        model = net()
        handle, alive = vk.attach(model, X), weakref.ref(model)
        monitor = vk.VCLMonitor(model)
        objective = model(X).mean() + handle.loss()
        if backward:
            objective.backward()
        del model, handle, monitor, objective
        gc.collect()
        found.append(alive() is None)
    assert found == [True, True]


class Latent(nn.Module):
    """Its activation gets a parameter."""

    def __init__(self):
        super().__init__()
        self.latent, self.act, self.last = nn.Parameter(X.clone()), nn.ELU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.act(self.latent)) + x.mean()


@pytest.mark.parametrize("end", ["backward", "forward", "remove"])
def test_hooks_of_leaves_are_taken_back(end):
    model = Latent()
    handle = vk.attach(model, X)
    monitor = vk.VCLMonitor(handle)
    for _ in range(2):
        if end == "backward":
            step(model, handle)
        else:
            model(X)
            assert len(model.latent._backward_hooks) == 1  # noqa: SLF001
    if end == "remove":
        monitor.remove()
    assert len(model.latent._backward_hooks) == (end == "forward")  # noqa: SLF001
    assert [math.isnan(row["share"]) for row in monitor.flush()] == 2 * [end != "backward"]


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest would take."""


def test_an_interrupt_anywhere_leaves_nothing():
    """Behind each line of the monitor that a forward runs, of 1 in 7."""
    folder, failed, stopped, at = os.path.dirname(look.__file__), [], 0, 0
    names = {f"{folder}{os.sep}{name}.py" for name in ("look", "recorder", "undo", "report", "rows", "share")}

    def stop_at(wanted):
        seen = 0

        def trace(frame, event, _):
            nonlocal seen
            if frame.f_code.co_filename not in names:
                return None
            if event == "line":
                seen += 1
                if seen == wanted:
                    sys.settrace(None)
                    raise Stop
            return trace

        return trace

    while True:
        at += 7
        model = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
        handle = vk.attach(model, X)
        bare = hooks(model)
        monitor = vk.VCLMonitor(handle)
        before = sys.gettrace()
        sys.settrace(stop_at(at))
        try:
            model(X)
        except Stop:
            stopped += 1
        else:
            break
        finally:
            sys.settrace(before)
        steps = monitor.step
        step(model, handle)
        rows = [row["layer"] for row in monitor.flush() if row["step"] == steps]
        left = hooks(model) - bare - 2, undo.uncompiled.looking, torch_private.compiler_stance()
        if rows != ["1"] or left[0] or left[1] or (left[2] or ("default",))[0] != "default":
            failed.append((at, rows, left))
        monitor.remove()
    assert failed == []
    assert stopped > 20


@pytest.mark.usefixtures("fresh_compiler")
def test_a_stance_that_ended_meanwhile_stays_ended():
    """An interrupt leaves "force_eager"; the stance around it ends before the monitor gives it back."""

    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ELU()

        def forward(self, _):
            raise Stop

    torch.compile(nn.ELU(), backend="eager")(X)  # imports the compiler
    monitor = vk.VCLMonitor(model := Interrupted())
    with pytest.raises(Stop), torch.compiler.set_stance("eager_on_recompile"):
        model(X)
    monitor.flush()
    assert torch_private.compiler_stance().stance == "default"
    with pytest.raises(Stop):
        model(X)
    assert torch_private.compiler_stance().stance == "force_eager"
    monitor.flush()
    assert torch_private.compiler_stance().stance == "default"


# Tensors without values of their own


@pytest.mark.parametrize("kind", ["FakeTensor", "TwoTensor"])
def test_a_tensor_without_values_costs_its_own_row(kind):
    model = net()
    monitor = vk.VCLMonitor(model)
    fakes = kind == "FakeTensor"
    x, mode = (X, FakeTensorMode(allow_non_fake_inputs=True)) if fakes else (TwoTensor(X, X), nullcontext())
    with pytest.warns(vk.VCLWarning, match=f"layer '.': its input is of type {kind}, a subclass of Tensor"), mode:
        model(x)
    model(X)
    assert list(monitor.skipped) == ["1", "3"]
    assert [row["step"] for row in monitor.flush()] == [1, 1]


def test_gradients_in_a_batch_are_left_out():
    model = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
    handle = vk.attach(model, X)
    monitor = vk.VCLMonitor(handle)
    y = model(X)
    with pytest.warns(vk.VCLWarning, match="layer '1': its gradient is that of several backward passes"):
        torch.autograd.grad(y, model[0].weight, torch.eye(40).view(40, 20, 2), is_grads_batched=True)
    (row,) = monitor.flush()
    assert math.isnan(row["share"])
    assert math.isfinite(row["loss"])


# Which layers, and which input


@pytest.mark.parametrize("kind", ["activation", "vcl", "attached", "after"])
def test_a_model_may_be_a_layer_itself(kind):
    x = (3 * X).requires_grad_()
    model = vk.VCL(4, weight=0.5) if kind == "vcl" else nn.Mish()
    if kind == "attached":  # as attach does it, which takes no model that is one activation
        inner = nn.Sequential(model)
        handle = vk.attach(inner, X)
        assert list(handle.layers) == ["0"]
    if kind == "after":
        inner = nn.Sequential(model)
        handle = vk.attach(inner, X, layers=[], after=["0"])
    monitor = vk.VCLMonitor(model, every=2)
    for _ in range(3):
        y = model(x)
    rows = monitor.flush()
    assert [(row["step"], row["layer"]) for row in rows] == [(0, type(model).__name__), (2, type(model).__name__)]
    assert rows[0]["variance"] == variance(nn.Mish()(x) if kind == "after" else x)
    assert math.isnan(rows[0]["loss"]) == (kind == "activation")
    assert y.shape == x.shape
    monitor.remove()
    assert hooks(model) == {"activation": 0, "vcl": 0, "attached": 1, "after": 1}[kind]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("activation", [nn.ELU, nn.Mish])
def test_statistics_are_of_what_hooks_of_the_user_made(activation, attached):
    """The fused and the others; an earlier hook changes the input."""
    model = nn.Sequential(nn.Linear(4, 8), activation())
    model[1].register_forward_pre_hook(lambda _m, args: (10 * args[0],))
    handle = vk.attach(model, X) if attached else model
    with vk.VCLMonitor(handle) as monitor:
        model(X)
    (row,) = monitor.rows
    assert row["variance"] == variance(10 * model[0](X))
    assert math.isnan(row["loss"]) == (not attached)


def test_layers_may_come_and_go():
    model = net()
    handle = vk.attach(model, X, layers=[], after=["2"])
    monitor = vk.VCLMonitor(model)
    model(X)
    handle.remove()
    model[1] = nn.Tanh()
    model(X)
    handle = vk.attach(model, X, after=["0"])
    step(model, handle)
    found = [(row["step"], row["layer"]) for row in monitor.flush()]
    assert found == [(0, "1"), (0, "2"), (0, "3"), (1, "1"), (1, "3"), (2, "0"), (2, "1"), (2, "3")]
    assert monitor.rows[4]["variance"] == variance(model[2](model[1](model[0](X))))
    assert monitor.skipped == {}


def test_a_part_finds_the_vcl_that_acts():
    """Attach saw two calls in the whole model; each is a forward of the part."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 4), nn.ELU(), nn.Linear(4, 4))

        def forward(self, x):
            return self.part(self.part(x))

    model = Twice()
    handle = vk.attach(model, X)
    part, whole = vk.VCLMonitor(model.part), vk.VCLMonitor(model)
    step(model, handle)
    wanted = whole.flush()
    assert [row["layer"] for row in wanted] == ["part.1", "part.1:1"]
    for name in ("loss", "share", "variance"):
        assert [row[name] for row in part.flush() or part.rows] == [row[name] for row in wanted]
    assert [row["loss"] for row in wanted] == pytest.approx([float(loss) for loss in handle.losses.values()])


def test_copies_made_inside_of_a_forward_lose_its_hooks():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.made = nn.ELU(), nn.Mish(), []

        def forward(self, x):
            x = self.first(x)
            if not self.made:
                self.made.append(copy.deepcopy(self))
            return self.second(x)

    model = Copies()
    monitor = vk.VCLMonitor(model)
    model(X)
    (copied,) = model.made
    copied.made.append(None)
    copied(X)
    assert hooks(copied) == 0
    assert [row["layer"] for row in monitor.flush()] == ["first", "second"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.trace
def test_what_is_no_step_is_not_counted(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    monitor = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match="torch.jit traces it"):
        torch.jit.trace(model, X, check_trace=False)
    assert monitor.step == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    other = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match="a CUDA graph is captured"):
        model(X)
    assert list(other.skipped) == ["Sequential"]
    assert other.flush() == []


def test_a_property_that_raises_is_no_layer():
    class Raises(nn.Module):
        @property
        def vcl(self):
            raise RuntimeError("not built yet")

        def forward(self, x):
            return x

    model = nn.Sequential(Raises(), nn.ELU())
    with vk.VCLMonitor(model) as monitor:
        model(X)
    assert [row["layer"] for row in monitor.rows] == ["1"]


# Numbers


def looked_at(x, **options):
    model = nn.Sequential(nn.Identity(), nn.ELU())
    with vk.VCLMonitor(model, **options) as monitor:
        model(x)
    return monitor.rows[0]


def test_constant_units_do_not_count():
    """The mean of equal values rounds, and the squares of what is left have a kurtosis of 1."""
    x = torch.tensor([0.1, 0.3, 0.7, -1.3]).repeat(300, 1)
    x[:, 0] = torch.randn(300)
    alone = looked_at(x[:, :1])
    row = looked_at(x)
    assert row["kurtosis"] == pytest.approx(alone["kurtosis"], rel=1e-4)
    assert row["constancy"] == pytest.approx(alone["constancy"], rel=1e-4)
    assert looked_at(torch.randn(300, 4) + 1e4)["kurtosis"] == pytest.approx(3, abs=1)  # varies beyond rounding


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_numbers_do_not_leave_the_range_of_float32(factor):
    plain, row = looked_at(X), looked_at(X * factor)
    for name in ("constancy", "kurtosis"):
        assert row[name] == pytest.approx(plain[name], rel=1e-4)
    shares = []
    for scale in (1.0, factor**3):
        torch.manual_seed(0)
        model = net()
        handle = vk.attach(model, X, weight=0.5)
        monitor = vk.VCLMonitor(handle)
        ((model(X).square().mean() + handle.loss()) * scale).backward()
        shares.append([row["share"] for row in monitor.flush()])
    assert shares[1] == pytest.approx(shares[0], rel=1e-4)


def test_share_of_an_odd_number_of_sub_batches():
    """The ratio takes pairs, so that 3 are 2."""
    shares = []
    for K in (2, 3):
        torch.manual_seed(0)
        model = net()
        handle = vk.attach(model, X, num_sub_batches=K, weight=0.5)
        monitor = vk.VCLMonitor(handle)
        step(model, handle)
        assert monitor.skipped == {}
        shares.append([row["share"] for row in monitor.flush()])
    assert shares[0] == shares[1]


def test_units_are_those_of_the_vcl():
    x = torch.randn(20, 2, 4, 4) + 5 * torch.randn(2, 4, 4)  # a position has its own mean
    vcl = vk.VCL(unit="activation")
    with vk.VCLMonitor(vcl) as monitor, vk.VCLMonitor(vcl, unit="channel") as other:
        vcl(x)
    for watched, unit in ((monitor, "activation"), (other, "channel")):
        var = vk.sub_batch_moments(x, 5, unit=unit)[1]
        assert watched.rows[0]["variance"] == pytest.approx(float(var.mean()), rel=1e-5)
    assert looked_at(x)["variance"] == pytest.approx(other.rows[0]["variance"], rel=1e-5)


# Warnings


class Many(nn.Module):
    """Calls an activation many times with what cannot be looked at."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.ELU()

    def forward(self, x):
        for row in x:
            self.first(row)
        return self.second(x)


def test_a_layer_is_told_once():
    model = Many()
    monitor = vk.VCLMonitor(model)
    with pytest.warns(vk.VCLWarning, match="cannot look at layer 'first'") as told:
        model(X)
    assert len(told) == 1
    assert list(monitor.skipped) == ["first"]


def test_warnings_that_are_errors_stop_no_forward(tmp_path):
    model = Many()
    monitor = vk.VCLMonitor(model, csv=tmp_path / "run.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error", vk.VCLWarning)
        model(X)
        with pytest.raises(vk.VCLWarning, match="cannot look at layer 'first'"):
            monitor.flush()
    assert [row["layer"] for row in read_csv(tmp_path / "run.csv")] == ["second"]
    assert monitor.flush() == []


def test_threads_stop_nothing():
    """Their calls are mixed, and no number is right; but nothing raises, and nothing stays."""
    model, errors = net(), []
    monitor = vk.VCLMonitor(model)

    def run():
        try:
            for _ in range(30):
                model(X).mean().backward()
        except Exception as error:
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vk.VCLWarning)
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monitor.flush()
    monitor.remove()
    model(X)
    assert errors == []
    assert hooks(model) == 0


def test_names_of_torch_that_are_missing(monkeypatch):
    """The stance is then the default one, and gradients are taken for those of one backward pass."""
    monkeypatch.setitem(sys.modules, "torch._dynamo.eval_frame", types.ModuleType("empty"))
    assert torch_private.compiler_stance() is None
    monkeypatch.delattr("torch._C._functorch.is_legacy_batchedtensor")
    monkeypatch.delattr("torch._C._functorch.is_functorch_wrapped_tensor")
    assert not torch_private.is_batched(X)

"""One step of Fabric, pytorch-ignite and skorch is the one by hand, however VCL is added; their examples train."""

from __future__ import annotations

import io
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from libraries import library
from sklearn.base import clone
from sklearn.datasets import load_digits
from torch import nn

import vcl_kernels as vk

WEIGHT = 0.3  # so large that VCL has a part in the gradients that shows
ROWS = 10  # two sub-batches of five
TOLERANCE = 4e-6  # of a gradient in float32, as a part of the largest
CLIP = 0.1  # less than the norm of each gradient here

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # ignite imports what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
]
added = pytest.mark.parametrize("inject", [False, True], ids=["loss()", "inject"])
accumulated = pytest.mark.parametrize("accumulation", [1, 3])
clipped = pytest.mark.parametrize("clip", [None, CLIP], ids=["", "clipped"])


def network():
    return nn.Sequential(nn.Linear(64, 16), nn.ELU(), nn.Linear(16, 12), nn.Mish(), nn.Linear(12, 10))


def digits(batches):
    """Return so many batches of images and labels."""
    x, y = (torch.as_tensor(array[: batches * ROWS]) for array in load_digits(return_X_y=True))
    return list(zip((x.float() / 8 - 1).split(ROWS), y.split(ROWS), strict=True))


def attached(inject, accumulation=1):
    net = network()
    handle = vk.attach(net, torch.zeros(2, 64), weight=WEIGHT, inject=inject)
    if inject:
        handle.accumulation = accumulation
    return net, handle


def twin(net):
    """Return a plain copy of a network with VCL attached anew, for ``handle.loss()``."""
    other, _ = attached(False)
    other.load_state_dict(net.state_dict())
    return other


def stepping(net):
    """Return an optimizer whose step subtracts the gradient."""
    return torch.optim.SGD(net.parameters(), lr=1.0)


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def by_hand(parameters, batches, clip=None):
    """Return the gradient of a step in plain PyTorch, and how much of it is VCL's."""
    net = network()
    net.load_state_dict(dict(zip(net.state_dict(), parameters, strict=True)))
    task = vcl = torch.zeros(())
    for x, y in batches:
        first = net[0](x)
        second = net[2](F.elu(first))
        task = task + F.cross_entropy(net[4](F.mish(second)), y) / len(batches)
        both = sum(vk.reference.vcl_loss(pre, unit="activation") for pre in (first, second))
        vcl = vcl + WEIGHT * both / len(batches)
    of_task, of_vcl = (
        torch.autograd.grad(loss, net.parameters(), retain_graph=True, materialize_grads=True) for loss in (task, vcl)
    )
    gradient = [a + b for a, b in zip(of_task, of_vcl, strict=True)]
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    if clip is not None:
        assert norm > 2 * clip
        gradient, of_vcl = ([g * clip / (norm + 1e-6) for g in gs] for gs in (gradient, of_vcl))
    return gradient, of_vcl


def check(before, after, batches, clip=None):
    """Hold a step, of which the parameters are known before and after, to the one by hand."""
    expected, of_vcl = by_hand(before, batches, clip)
    found = [a - b for a, b in zip(before, after, strict=True)]
    largest = max(g.abs().max() for g in expected)
    wrong = max((g - f).abs().max() for g, f in zip(expected, found, strict=True)) / largest
    assert wrong <= TOLERANCE
    # VCL counted never, twice, three times or divided by three once more would be far from it
    assert max(g.abs().max() for g in of_vcl) > 1e4 * TOLERANCE * largest


def plain_step(net, batches, dtype, scale=1.0, clip=None):
    """Make a step of ``net``, to which ``handle.loss()`` is added, in a plain loop under autocast; return the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    optimizer, handle, before = stepping(net), vk.handle_of(net), values(net)
    for x, y in batches:
        with torch.autocast("cpu", dtype):
            output = net(x)
        scaler.scale((F.cross_entropy(output.float(), y) + handle.loss()) / len(batches)).backward()
    scaler.unscale_(optimizer)
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    scaler.step(optimizer)
    return before, values(net)


def check_equal(step, other):
    """Hold a step to another of the same network, within float32's rounding of the parameters."""
    torch.testing.assert_close(step, other, rtol=0, atol=1e-7)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(*step, strict=True))  # nor were both skipped


# Fabric


def fabric_step(net, batches, clip=1e9, **settings):
    library("lightning")
    from lightning.fabric import Fabric

    from examples import fabric_loop

    fabric = Fabric(accelerator="cpu", devices=1, **settings)
    before, (model, optimizer) = values(net), fabric.setup(net, stepping(net))
    fabric_loop.step(fabric, model, optimizer, batches, clip)
    return before, values(net)


@clipped
@accumulated
@added
def test_a_step_of_fabric_is_that_by_hand(inject, accumulation, clip):
    (net, _), batches = attached(inject, accumulation), digits(accumulation)
    check(*fabric_step(net, batches, clip or 1e9), batches, clip)


@accumulated
@added
def test_a_step_of_fabric_in_bfloat16_is_that_of_a_plain_loop(inject, accumulation):
    (net, _), batches = attached(inject, accumulation), digits(accumulation)
    plain = twin(net)
    step = fabric_step(net, batches, precision="bf16-mixed")
    check_equal(step, plain_step(plain, batches, torch.bfloat16))


@accumulated
@added
def test_a_step_of_fabric_in_float16_wants_its_scaler(inject, accumulation):
    library("lightning")
    from lightning.fabric.plugins import MixedPrecision

    (net, handle), batches = attached(inject, accumulation), digits(accumulation)
    plain = twin(net)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    if inject:
        handle.grad_scaler = plugin.scaler
    step = fabric_step(net, batches, CLIP, plugins=plugin)
    check_equal(step, plain_step(plain, batches, torch.float16, 1024.0, CLIP))


@pytest.mark.parametrize("settings", [{"inject": True}, {"precision": "bf16-mixed", "accumulation": 3}])
def test_the_example_of_fabric_learns(settings):
    library("lightning")
    from examples.fabric_loop import main

    assert main(epochs=3, accelerator="cpu", **settings) > 0.8


# ignite


def ignite_step(net, batches, objective, **settings):
    from ignite.engine import Events, create_supervised_trainer

    trainer = create_supervised_trainer(
        net, stepping(net), objective, gradient_accumulation_steps=len(batches), **settings
    )
    before, reported = values(net), []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: reported.append((engine.state.output, sum(vk.handle_of(net).losses.values()).item())),
    )
    trainer.run(batches)
    return before, values(net), reported


def with_loss(handle):
    return lambda output, labels: F.cross_entropy(output, labels) + handle.loss()


# ignite runs autocast for CUDA, which leaves tensors on the CPU alone
@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported:UserWarning")
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["", "scaled"])
@accumulated
@added
def test_a_step_of_ignite_is_that_by_hand(inject, accumulation, scale):
    pytest.importorskip("ignite")
    (net, handle), batches = attached(inject, accumulation), digits(accumulation)
    settings = {}
    if scale is not None:
        settings = {"amp_mode": "amp", "scaler": torch.amp.GradScaler("cpu", init_scale=scale)}
        if inject:
            handle.grad_scaler = settings["scaler"]
    plain = twin(net)
    before, after, reported = ignite_step(net, batches, F.cross_entropy if inject else with_loss(handle), **settings)
    check(before, after, batches)
    for (x, y), (output, of_vcl) in zip(batches, reported, strict=True):
        task = F.cross_entropy(plain(x), y).item()
        assert of_vcl == pytest.approx(vk.handle_of(plain).loss().item())
        assert output == pytest.approx(task if inject else task + of_vcl)


@pytest.mark.parametrize("inject", [False, True])
def test_the_example_of_ignite_learns(inject, capsys):
    pytest.importorskip("ignite")
    from examples.ignite_engine import main

    assert main(epochs=5, inject=inject) > 0.8
    assert re.match(r"step 100: loss \d\.\d+, VCL of layers 1 0\.\d+, 3 0\.\d+\n", capsys.readouterr().out)


# skorch


def classifier(kind, module, **settings):
    return kind(
        module,
        criterion=nn.CrossEntropyLoss,
        **{"lr": 1.0, "batch_size": ROWS, "max_epochs": 1, "train_split": None, "verbose": 0, **settings},
    )


def skorch_kinds():
    """Return skorch's classifier, and one that adds ``handle.loss()``."""
    skorch = pytest.importorskip("skorch")

    class WithLoss(skorch.NeuralNetClassifier):
        def get_loss(self, *args, **kwargs):
            return super().get_loss(*args, **kwargs) + vk.handle_of(self.module_).loss()

    return skorch.NeuralNetClassifier, WithLoss


@clipped
@added
def test_a_step_of_skorch_is_that_by_hand(inject, clip):
    kind, batches = skorch_kinds()[not inject], digits(1)
    clipping = pytest.importorskip("skorch.callbacks").GradientNormClipping(clip)
    net = classifier(kind, lambda: attached(inject)[0], callbacks=[clipping]).initialize()
    before = values(net.module_)
    net.partial_fit(*batches[0])
    check(before, values(net.module_), batches, clip)


@added
def test_a_step_of_skorch_in_bfloat16_is_that_of_a_plain_loop(inject):
    accelerate, hf, kind = library("accelerate"), pytest.importorskip("skorch.hf"), skorch_kinds()[not inject]
    state, batches = accelerate.state.AcceleratorState, digits(1)
    state._reset_state(reset_partial_state=True)  # noqa: SLF001  # one for all of this process, which others made
    try:
        net = classifier(
            type("Accelerated", (hf.AccelerateMixin, kind), {}),
            lambda: attached(inject)[0],
            accelerator=accelerate.Accelerator(cpu=True, mixed_precision="bf16"),
            device=None,
        ).initialize()
        before, plain = values(net.module_), twin(net.module_)
        net.partial_fit(*batches[0])
    finally:
        state._reset_state(reset_partial_state=True)  # noqa: SLF001
    check_equal((before, values(net.module_)), plain_step(plain, batches, torch.bfloat16))


@pytest.fixture
def trained():
    """The example's classifier with learned betas that are not decayed, after an epoch, and its data."""
    skorch = pytest.importorskip("skorch")
    from examples.skorch_classifier import network

    x, y = map(torch.cat, zip(*digits(8), strict=True))
    x, y = x.numpy(), y.numpy()
    net = classifier(
        skorch.NeuralNetClassifier,
        network,
        lr=0.1,
        module__width=16,
        module__weight=WEIGHT,
        module__beta_mode="learned",
        optimizer__param_groups=[("*.vcl.*.beta", {"weight_decay": 0.0})],
        optimizer__weight_decay=1e-4,
    )
    return net.fit(x, y), x, y


def betas(net):
    return torch.stack([beta.detach() for beta in net.module_.vcl_handle.parameters()])


def test_betas_of_skorch_are_learned_in_every_fit(trained):
    net, x, y = trained
    undecayed, decayed = net.optimizer_.param_groups
    assert (len(undecayed["params"]), undecayed["weight_decay"]) == (2, 0.0)
    assert (len(decayed["params"]), decayed["weight_decay"]) == (6, 1e-4)
    handle, first = net.module_.vcl_handle, betas(net)
    assert (first - 1).abs().min() > 0
    net.partial_fit(x, y)
    assert net.module_.vcl_handle is handle
    assert (betas(net) - first).abs().min() > 0
    net.set_params(warm_start=True).fit(x, y)
    assert net.module_.vcl_handle is handle
    net.set_params(warm_start=False).fit(x, y)
    assert net.module_.vcl_handle is not handle
    assert (betas(net) - 1).abs().min() > 0
    net.set_params(module__weight=0.5, verbose=0)
    assert net.module_.vcl_handle.weight == 0.5


@pytest.mark.parametrize("way", ["pickle", "params"])
def test_skorch_saves_and_loads(trained, way):
    net, x, y = trained
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(net))
    else:
        module, optimizer = io.BytesIO(), io.BytesIO()
        net.save_params(f_params=module, f_optimizer=optimizer)
        loaded = clone(net).initialize()
        loaded.load_params(f_params=io.BytesIO(module.getvalue()), f_optimizer=io.BytesIO(optimizer.getvalue()))
    assert torch.equal(betas(loaded), betas(net))
    assert np.array_equal(loaded.predict_proba(x), net.predict_proba(x))
    for either in (loaded, net):
        either.partial_fit(x, y)
    assert torch.equal(betas(loaded), betas(net))
    assert np.array_equal(loaded.predict_proba(x), net.predict_proba(x))


def test_a_fit_of_a_clone_is_that_of_the_first(trained):
    net, x, y = trained
    copied = clone(net)
    assert copied.initialized_ is False
    for either in (copied, net):
        torch.manual_seed(2)
        either.fit(x, y)
    assert torch.equal(betas(copied), betas(net))


def test_the_example_of_skorch_learns(capsys):
    pytest.importorskip("skorch")
    from examples.skorch_classifier import main

    assert main(epochs=3, weights=(WEIGHT,), folds=2) > 0.8
    assert capsys.readouterr().out.startswith(f"weight {WEIGHT}: accuracy in cross-validation 0.")

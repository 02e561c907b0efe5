"""attach on models of other libraries: what it finds, one step beside one by hand, and loops of other libraries."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import LEARNED
from libraries import CASES, library
from torch import nn

import vcl_kernels as vk

WEIGHT = 0.3  # so large that VCL has a part in the gradients that shows
SETTINGS = {**LEARNED, "weight": WEIGHT}
ROWS = 10  # two sub-batches of five

# The largest error of a gradient, as a part of the largest gradient
TOLERANCES = {torch.float32: 4e-6, torch.float64: 1e-12}

pytestmark = pytest.mark.usefixtures("one_thread")
cases = pytest.mark.parametrize("name", CASES)


def inputs_of(case, rows):
    inputs = case.inputs(rows)
    if isinstance(inputs, torch.Tensor):
        return inputs.to(case.dtype)
    return {name: x.to(case.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def attach(net, case):
    with pytest.warns(vk.VCLWarning, match=case.warning) if case.warning else nullcontext():
        return vk.attach(net, inputs_of(case, 2), **SETTINGS)


def record_losses(net, case):
    """Return the losses of the activations' inputs by name, of a forward of the plain model that is still to come."""
    losses = {}

    def record(name, _module, args, kwargs):
        x = [*args, *kwargs.values()][0].clone()  # the activation may overwrite its input
        if case.last is not None and re.search(case.last, name):
            x = x.movedim(-1, 1)
        call = sum(key.split(":")[0] == name for key in losses)
        losses[f"{name}:{call}" if call else name] = WEIGHT * vk.reference.vcl_loss(x, x.new_ones(x.shape[1]))

    for name, module in net.named_modules():
        if type(module).__name__ in case.activations.split():
            module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
    return losses


def task_loss(net, inputs):
    """Return the loss of some task, with the same dropout in every call."""
    torch.manual_seed(1)
    output = net(**inputs) if isinstance(inputs, dict) else net(inputs)
    return (output if isinstance(output, torch.Tensor) else output[0]).sin().mean()


@cases
def test_every_activation_is_found(name):
    case = CASES[name]
    handle = attach(case.make().to(case.dtype), case)
    assert len(handle.layers) == case.count, f"{handle}"


@cases
def test_a_step_is_that_by_hand(name):
    case = CASES[name]
    net = case.make().to(case.dtype).train()
    plain, inputs = copy.deepcopy(net), inputs_of(case, ROWS)
    handle = attach(net, case)
    (task_loss(net, inputs) + handle.loss()).backward()

    losses = record_losses(plain, case)
    task = task_loss(plain, inputs)
    assert len(losses) == case.count
    torch.testing.assert_close(handle.losses, {layer: loss.detach() for layer, loss in losses.items()})

    names, parameters = zip(*plain.named_parameters(), strict=True)
    of_vcl, of_task = (
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in (sum(losses.values()), task)
    )
    expected = [a + b for a, b in zip(of_vcl, of_task, strict=True)]
    largest = max(gradient.abs().max() for gradient in expected)
    assert max(gradient.abs().max() for gradient in of_vcl) > 1e-3 * largest
    ours = dict(net.named_parameters())
    wrong = {}
    for parameter, gradient in zip(names, expected, strict=True):
        grad = ours[parameter].grad
        error = (gradient if grad is None else gradient - grad).abs().max() / largest
        if not error <= TOLERANCES[case.dtype]:  # nor if it is NaN
            wrong[parameter] = float(error)
    assert wrong == {}


@pytest.mark.filterwarnings("ignore:.*are functions:vcl_kernels.VCLWarning")
def test_after_gives_vcl_to_what_gated_layers_take():
    case = CASES["UNet2DConditionModel"]
    net = case.make()
    plain, inputs = copy.deepcopy(net), case.inputs(ROWS)
    projections = [name for name, _ in net.named_modules() if name.endswith("ff.net.0.proj")]
    handle = vk.attach(net, case.inputs(2), after=projections, **SETTINGS)
    assert len(handle.layers) == case.count + 4
    net(**inputs)
    outputs = {}
    for name in projections:
        plain.get_submodule(name).register_forward_hook(lambda _module, _args, y, name=name: outputs.update({name: y}))
    plain(**inputs)
    for name, y in outputs.items():
        loss = WEIGHT * vk.reference.vcl_loss(y.movedim(-1, 1))
        torch.testing.assert_close(handle.losses[name], loss.detach())
    assert len(outputs) == 4


def test_every_activation_of_transformers_is_found(subtests):
    activations = library("transformers.activations").ACT2FN
    x = torch.randn(ROWS, 4)
    for name in sorted(set(activations) - {"linear"}):
        with subtests.test(name):
            net = nn.Sequential(nn.Linear(4, 8), activations[name])
            handle = vk.attach(net, x[:2], **SETTINGS)
            assert list(handle.layers) == ["1"]
            net(x)
            torch.testing.assert_close(handle.loss(), WEIGHT * vk.reference.vcl_loss(net[0](x)))
    assert len(activations) > 20
    with pytest.raises(ValueError, match="activation"):
        vk.attach(nn.Sequential(nn.Linear(4, 8), activations["linear"]), x)


def classifier():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ELU(), nn.Flatten(), nn.Linear(216, 3))
    vk.attach(net, torch.randn(2, 1, 8, 8), **SETTINGS)
    data = torch.utils.data.TensorDataset(torch.randn(2 * ROWS, 1, 8, 8), torch.randint(3, (2 * ROWS,)))
    return net, torch.utils.data.DataLoader(data, batch_size=ROWS)


def optimizer_of(net):
    return torch.optim.SGD(vk.param_groups(net, weight_decay=1e-4), lr=0.1)


def objective(net, images, labels):
    return F.cross_entropy(net(images), labels) + net.vcl_handle.loss()


def trained(net, loader):
    """Return the state of a copy of ``net`` that a plain loop has trained."""
    net = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    for images, labels in loader:
        optimizer.zero_grad()
        objective(net, images, labels).backward()
        optimizer.step()
    assert net[1].vcl[0].beta.sub(1).abs().min() > 0
    return dict(net.state_dict())


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning_trains_as_a_plain_loop_does():
    lightning = library("lightning")
    net, loader = classifier()
    expected = trained(net, loader)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _index):
            return objective(self.net, *batch)

        def configure_optimizers(self):
            return optimizer_of(self.net)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), loader)
    assert trainer.global_step == 2
    torch.testing.assert_close(dict(net.state_dict()), expected, rtol=0, atol=0)


def test_accelerate_trains_as_a_plain_loop_does():
    accelerator = library("accelerate").Accelerator(cpu=True)
    net, loader = classifier()
    expected = trained(net, loader)
    prepared, optimizer, loader = accelerator.prepare(net, optimizer_of(net), loader)
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(objective(prepared, images, labels))
        optimizer.step()
    torch.testing.assert_close(dict(net.state_dict()), expected, rtol=0, atol=0)

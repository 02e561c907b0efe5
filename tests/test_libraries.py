"""attach on models of other libraries: what it finds, and one step beside one by hand."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
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

"""VCL in a loop of accelerate, with handle.loss() and with inject=True: steps beside one by hand."""

from __future__ import annotations

import copy
import gc
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from by_hand import WEIGHT, assert_as_exact, assert_same, batches, gradients, network, step, task
from libraries import library
from torch import nn

import vcl_kernels as vk

pytestmark = pytest.mark.usefixtures("one_thread")
added = pytest.mark.parametrize("inject", [False, True], ids=["loss()", "inject"])


@pytest.fixture
def accelerate():
    """The library, and the functions of ours. Its state, one for a process, begins anew."""
    accelerate = library("accelerate")
    from vcl_kernels.integrations.accelerate import attach, follow

    accelerate.state.AcceleratorState._reset_state(True)  # noqa: SLF001
    yield SimpleNamespace(Accelerator=partial(accelerate.Accelerator, cpu=True), attach=attach, follow=follow)
    accelerate.state.AcceleratorState._reset_state(True)  # noqa: SLF001


def train(accelerator, net, data, handle, clip=None, rate=1.0):
    """Train an attached network in a usual loop of accelerate; add ``handle.loss()`` if it is not injected."""
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=rate))
    for batch in data:
        with accelerator.accumulate(net):
            loss = task(net, batch)
            accelerator.backward(loss if handle.inject else loss + handle.loss())
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def attached(accelerate, accelerator, net, inject, **settings):
    example = batches(1)[0][0]
    if inject:
        return accelerate.attach(accelerator, net, example, weight=WEIGHT, **settings)
    return vk.attach(net, example, weight=WEIGHT, **settings)


@added
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_is_that_by_hand(k, clip, inject, accelerate):
    net, data, accelerator = network(), batches(k), accelerate.Accelerator(gradient_accumulation_steps=k)
    before = copy.deepcopy(net)
    train(accelerator, net, data, attached(accelerate, accelerator, net, inject), clip)
    assert_same(step(before, net), gradients(before, data, clip=clip))
    wrong = gradients(before, data, clip=clip, weight=WEIGHT * k if k > 1 else 0.0)
    with pytest.raises(AssertionError):  # it would show if VCL were counted k times, or not at all
        assert_same(step(before, net), wrong, 0.01)


@added
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_in_bfloat16_is_that_by_hand(k, inject, accelerate):
    net, data = network(), batches(k)
    before = copy.deepcopy(net)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=k, mixed_precision="bf16")
    train(accelerator, net, data, attached(accelerate, accelerator, net, inject))
    eager = gradients(before, data, context=partial(torch.autocast, "cpu", torch.bfloat16))
    assert_as_exact(step(before, net), eager, gradients(before, data))


@added
def test_a_gradient_is_scaled_once(inject, accelerate):
    net, data, accelerator = network(), batches(3), accelerate.Accelerator(gradient_accumulation_steps=3)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as it has with mixed_precision="fp16"
    before = copy.deepcopy(net)
    train(accelerator, net, data, attached(accelerate, accelerator, net, inject))
    assert accelerator.scaler.get_scale() == 1024
    assert_same(step(before, net), gradients(before, data))


def test_the_accumulation_may_change(accelerate):
    net, data, accelerator = network(), batches(3), accelerate.Accelerator()
    handle = attached(accelerate, accelerator, net, True)
    before = copy.deepcopy(net)
    vk.handle_of(before).remove()
    accelerator.gradient_accumulation_steps = 3
    train(accelerator, net, data, handle)
    assert_same(step(before, net), gradients(before, data))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_follows_nothing(copied, accelerate):
    net, accelerator = network(), accelerate.Accelerator(gradient_accumulation_steps=3)
    handle = attached(accelerate, accelerator, net, True)
    accelerator.gradient_accumulation_steps = 4
    other = copied(net)
    accelerator.gradient_accumulation_steps = 2
    assert vk.handle_of(other).accumulation == 4  # that of the time of the copy
    assert handle.accumulation == 2


@added
def test_a_resumed_training_is_a_straight_one(inject, accelerate, tmp_path):
    def make():
        net, accelerator = network(), accelerate.Accelerator(gradient_accumulation_steps=2)
        return net, accelerator, attached(accelerate, accelerator, net, inject, beta_mode="learned")

    data = batches(8)
    net, accelerator, handle = make()
    train(accelerator, net, data[:4], handle, rate=0.1)
    accelerator.save_state(str(tmp_path))
    train(accelerator, net, data[4:], handle, rate=0.1)
    resumed, accelerator, handle = make()
    accelerator.prepare(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1))
    accelerator.load_state(str(tmp_path))
    train(accelerator, resumed, data[4:], handle, rate=0.1)
    torch.testing.assert_close(dict(resumed.state_dict()), dict(net.state_dict()), rtol=0, atol=0)
    assert resumed[1].vcl[0].beta.sub(1).abs().max() > 0


def test_an_accelerator_is_followed_while_it_is_there(accelerate):
    net, accelerator = network(), accelerate.Accelerator(gradient_accumulation_steps=3)
    handle = attached(accelerate, accelerator, net, True)
    hooks = len(net._forward_pre_hooks)  # noqa: SLF001
    accelerate.follow(handle, accelerator)
    assert len(net._forward_pre_hooks) == hooks  # noqa: SLF001
    accelerator.gradient_accumulation_steps = 2
    assert handle.accumulation == 2
    del accelerator
    gc.collect()
    assert handle.accumulation == 1
    handle.accumulation = 4
    assert handle.accumulation == 4


def test_what_cannot_work_is_an_error(accelerate):
    accelerator = accelerate.Accelerator()
    removed = accelerate.attach(accelerator, network())
    removed.remove()
    with pytest.raises(ValueError, match="handle was removed"):
        accelerate.follow(removed, accelerator)
    with pytest.raises(ValueError, match="inject=False needs nothing of this"):
        accelerate.attach(accelerator, network(), inject=False)
    with pytest.raises(ValueError, match="handle was made without inject=True and needs nothing"):
        accelerate.follow(vk.attach(network()), accelerator)
    with pytest.raises(TypeError, match="handle must be what vcl_kernels.attach returned; got a Linear"):
        accelerate.follow(nn.Linear(2, 2), accelerator)
    with pytest.raises(TypeError, match="accelerator must be an accelerate.Accelerator; got a Sequential"):
        accelerate.attach(network(), accelerator)
    accelerator.state.distributed_type = type(accelerator.distributed_type).DEEPSPEED
    with pytest.raises(ValueError, match="DEEPSPEED divides and scales the loss itself"):
        accelerate.attach(accelerator, network())


def test_the_example_learns(accelerate, capsys):
    from examples import accelerate_loop

    assert accelerate.Accelerator  # imported first
    assert accelerate_loop.main(epochs=3, images=400, cpu=True) < 45  # half of chance
    assert float(capsys.readouterr().out.split("VCL ")[1].split(",")[0]) > 0

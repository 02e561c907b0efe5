"""remove_batch_norm on drawn models: sequential and branching ones, with norms and shared modules anywhere."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normed import randomised
from torch import nn

import vcl_kernels as vk
from vcl_kernels.nn.affine import ChannelAffine

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 3
few = settings(max_examples=12, deadline=None, derandomize=True)
KINDS = st.sampled_from(["conv0", "conv1", "conv2", "norm0", "norm1", "norm2", "relu", "add"])


def modules():
    made = {"relu": nn.ReLU()}
    for i, size in enumerate((1, 1, 3)):
        made[f"conv{i}"] = nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, bias=i < 2)
        made[f"norm{i}"] = nn.BatchNorm2d(CHANNELS, affine=i < 2)
    return made


class Program(nn.Module):
    """Computes values one after another, each by a module (or the sum) of earlier ones; returns those nothing uses."""

    def __init__(self, steps, asks):
        super().__init__()
        self.steps, self.asks = steps, asks
        for name, module in modules().items():
            self.add_module(name, module)

    def forward(self, x):
        values = [x]
        if self.asks and x.abs().max() > 1e9:  # cannot be traced
            return x
        for kind, sources in self.steps:
            taken = [values[i] for i in sources]
            values.append(sum(taken) if kind == "add" else getattr(self, kind)(taken[0]))
        return tuple(value for i, value in enumerate(values) if not users(self.steps, i))


def users(steps, i):
    """Which modules use the i-th value."""
    return {kind for kind, sources in steps if i in sources}


@st.composite
def programs(draw):
    steps, branches = [], draw(st.booleans())
    for i in range(draw(st.integers(2, 9))):
        kind = draw(KINDS)
        earlier = st.integers(max(0, i - 3), i) if branches else st.just(i)
        steps.append((kind, [draw(earlier) for _ in range(2 if kind == "add" else 1)]))
    return steps


def foldable(steps, norm):
    """Whether one convolution alone feeds ``norm``, and ``norm`` alone takes all that it returns."""
    makers = {steps[i - 1][0] if i else "x" for kind, sources in steps if kind == norm for i in sources}
    if len(makers) != 1 or not (maker := makers.pop()).startswith("conv"):
        return False
    return all(users(steps, i + 1) == {norm} for i, (kind, _) in enumerate(steps) if kind == maker)


def check(net, x, shown, folds):
    randomised(net).double().eval()
    norms = {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before = net(x)
    removal = vk.remove_batch_norm(net, x if shown else None)
    torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.train()(x), before, rtol=1e-9, atol=1e-9)
    assert {name: not isinstance(norm, ChannelAffine) for name, norm in norms.items()} == {
        name: folds(name) for name in norms
    }, f"{removal}"


@pytest.mark.parametrize("shown", [False, True], ids=["traced", "shown"])
@few
@given(steps=programs(), asks=st.booleans(), seed=st.integers(0, 99))
def test_programs(shown, steps, asks, seed):
    torch.manual_seed(seed)
    if not any(kind.startswith("norm") for kind, _ in steps):
        steps.append(("norm0", [0]))
    net, x = Program(steps, asks), torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64)
    check(net, x, shown, lambda name: foldable(steps, name) and (shown or not asks))


@pytest.mark.parametrize("shown", [False, True], ids=["traced", "shown"])
@few
@given(kinds=st.lists(KINDS.filter(lambda kind: kind != "add"), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_sequential(shown, kinds, seed):
    torch.manual_seed(seed)
    kinds.append("norm0")
    fresh = {f"{i}{kind}": copy.deepcopy(modules()[kind]) for i, kind in enumerate(kinds)}
    net, x = nn.Sequential(), torch.randn(3, CHANNELS, 4, 4, dtype=torch.float64)
    for name, module in fresh.items():
        net.add_module(name, module)
    before = dict(zip(list(fresh)[1:], kinds, strict=False))
    check(net, x, shown, lambda name: before.get(name, "").startswith("conv"))

"""The probe: where it finds features in the last dimension, what it refuses, and that it leaves no trace."""

import collections
import warnings

import common
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vcl_kernels as vk


class Model(common.Model):
    """With a linear layer and an activation, if not others of their names."""

    def __init__(self, steps, **layers):
        super().__init__(steps, **{"up": nn.Linear(6, 12), "act": nn.GELU(), **layers})


class NormOfImages(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def gated(m, x):
    gate, up = m.up(x).chunk(2, -1)
    return m.act(gate) * up


def low_rank(m, x):  # a sum of two linear layers, one of them scaled, as an adapter makes it
    return m.act(m.up(x) + 0.5 * m.second(m.first(x)))


def by_matrix(m, x):  # for all tokens at once, as GPT-2 does
    return m.act(torch.addmm(x.new_zeros(12), x.flatten(0, 1), m.matrix).unflatten(0, x.shape[:2]))


def by_sparse_matrix(m, x):  # a tensor without strides, changed in the forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR is new
        return m.act((torch.eye(len(x)).to_sparse_csr() * 2) @ m.up(x))


def two_sources(m, x):  # the sum has the memory order of the convolution's output
    tokens = m.conv(x).mT
    return m.act(tokens + m.up(tokens))


def encoder(m, x):
    tokens = m.stem(m.patches(x)).flatten(2).mT
    return m.gate(m.act(m.up(tokens)).mean(1))


def linear(*layers):
    return nn.Sequential(nn.Linear(6, 60), *layers)


IMAGES, TOKENS = torch.ones(2, 6, 4, 8), torch.ones(2, 9, 6)
CASES = {  # model, example, options of attach, units
    "dropout": (linear(nn.Dropout(), nn.GELU()), TOKENS, {}, 60),
    "rms norm": (nn.Sequential(nn.RMSNorm(6), nn.GELU()), TOKENS, {}, 6),
    "norm of whole images": (nn.Sequential(nn.LayerNorm([6, 4, 8]), nn.ReLU()), IMAGES, {}, 6),
    "norm that permutes": (nn.Sequential(NormOfImages(6), nn.ReLU()), IMAGES, {}, 6),
    "gated": (Model(gated), TOKENS, {}, 6),
    "low rank": (Model(low_rank, first=nn.Linear(6, 2), second=nn.Linear(2, 12)), TOKENS, {}, 12),
    "by matrix": (Model(by_matrix, matrix=nn.Parameter(torch.ones(6, 12))), TOKENS, {}, 12),
    "two sources": (Model(two_sources, conv=nn.Conv1d(9, 9, 1), up=nn.Linear(9, 9)), TOKENS, {}, 9),
    "sparse": (Model(by_sparse_matrix, up=nn.Linear(6, 12)), TOKENS[:, 0], {}, 12),
    "image": (linear(nn.Unflatten(1, (12, 5, 1)), nn.ReLU()), TOKENS[:, 0], {}, 12),
    "heads": (linear(nn.Unflatten(2, (4, 15)), nn.Tanh()), TOKENS, {}, 9),
    "convolution": (linear(nn.Conv1d(9, 9, 1), nn.ReLU()), TOKENS, {}, 9),
    "gate of images": (Model(lambda m, x: x * m.act(m.up(x.mean((2, 3)))[:, :6, None, None])), IMAGES, {}, 6),
    "compiled": (torch.compile(linear(nn.GELU()), backend="eager"), TOKENS, {}, 60),
    "transposed": (Model(lambda m, x: m.act(m.up(x).mT)), TOKENS, {}, 12),
    "linear layer named": (linear(), TOKENS, {"layers": ["0"]}, 6),
    "norm named": (nn.Sequential(nn.LayerNorm(6)), TOKENS, {"layers": ["0"]}, 6),
    "2-D": (linear(nn.GELU()), TOKENS[:, 0], {}, 60),
    "told the last": (nn.Sequential(nn.Conv1d(9, 8, 3), nn.ELU()), TOKENS, {"channel_dim": -1}, 4),
    "told the first": (linear(nn.ELU()), TOKENS, {"channel_dim": 1}, 9),
}


@pytest.mark.parametrize("case", CASES)
def test_where_features_are_last(case):
    model, example, options, units = CASES[case]
    handle = vk.attach(model, example, **common.LEARNED, **options)
    assert [tuple(beta.shape) for beta in handle.parameters()] == [(units,)]
    (vcl,) = (module for module in model.modules() if isinstance(module, vk.VCLActivation))
    assert ("channel_dim=-1" in repr(model)) == (vcl.channel_dim == -1)


@pytest.mark.parametrize("inject", [True, False])
def test_a_model_with_channels_in_both_dimensions(inject):
    net, x = Model(encoder, patches=nn.Conv2d(1, 6, 4, 4), stem=nn.ReLU(), gate=nn.SiLU()), torch.randn(20, 1, 12, 12)
    handle = vk.attach(net, x[:1], weight=0.5, inject=inject, **common.LEARNED)
    inputs = {}
    for name in ("stem", "act", "gate"):
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    net(x).sum().backward()
    inputs["act"] = inputs["act"].mT
    assert inputs["act"].shape == (20, 12, 9)
    for name, pre in inputs.items():
        torch.testing.assert_close(handle.losses[name], 0.5 * vk.vcl_loss(pre, 1.0), check_dtype=False)
    assert (net.act.vcl[0].beta.grad is not None) == inject


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_model_that_reads_what_is_overwritten_is_refused(act, shared):
    """It adds what an in-place activation left in its input, or what was there before."""
    net = Model(lambda m, x: x + m.act(m.up(x if shared else x.clone())), up=nn.Identity(), act=act)
    x = torch.randn(20, 4)
    before, expected = x.clone(), net(x.clone())
    if shared:
        with pytest.raises(ValueError, match="something else reads the tensor that they overwrite"):
            vk.attach(net, x)
        assert act.inplace
    else:
        vk.attach(net, x)
        assert torch.equal(net(x), expected)
    assert torch.equal(x, before)


def test_a_model_that_draws_numbers_is_not_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.ReLU(inplace=True))
    net[1].forward = F.dropout
    assert list(vk.attach(net, torch.randn(20, 4), **common.LEARNED).parameters())


def test_the_example_and_the_mode_are_left_alone():
    class Adapter(nn.Linear):
        def train(self, mode=True):
            raise AssertionError(f"train({mode}) would merge its weights")

    net, x = nn.Sequential(nn.ELU(inplace=True), Adapter(4, 2)), torch.randn(20, 4)
    before = x.clone()
    vk.attach(net, collections.UserDict(input=x))
    assert torch.equal(x, before)
    assert all(module.training for module in net.modules())


def test_activations_that_the_example_does_not_show():
    net = Model(lambda m, x: m.act(m.up(x)) * m.soft(m.scale), never=nn.Tanh(), soft=nn.Softplus())
    net.scale = nn.Parameter(torch.zeros(()))
    with pytest.warns(UserWarning, match="the example does not reach never. Betas"):
        handle = vk.attach(net, torch.randn(2, 6))
    net(torch.randn(20, 6)).sum().backward()
    assert list(handle.losses) == ["act"]
    with pytest.raises(ValueError, match=r"left out are 1: a 1-D tensor where \(N, C, …\) is wanted"):
        vk.attach(nn.Sequential(nn.Flatten(0), nn.ELU()), torch.ones(3))


class Table(nn.Module):
    """A learned bias, which its call takes no argument to return."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(12))

    def forward(self):
        return self.values


class Clipped(nn.Module):
    """An activation that calls a module which is no child of it, as one of transformers does."""

    def forward(self, x):
        return OUTSIDE(x).clamp(max=3)


OUTSIDE = nn.GELU()


def test_modules_without_arguments_get_no_vcl():
    net = Model(lambda m, x: m.act(m.up(x) + m.table()), table=Table())
    assert list(vk.attach(net, torch.randn(2, 6)).layers) == ["act"]


def test_a_module_that_an_activation_calls_is_part_of_it():
    net = Model(lambda m, x: m.act(m.up(x)), act=Clipped())
    handle = vk.attach(net, torch.randn(2, 6))
    assert list(handle.layers) == ["act"]
    assert "left out" not in str(handle)

"""What gets VCL and what does not: functions, after=, modules outside of the model, and the table that says so."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from common import LEARNED, Model
from torch import nn

import vcl_kernels as vk


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(8, 4)

    def forward(self, x):
        x, gate = self.up(x).chunk(2, -1)
        return self.down(x * F.gelu(gate))


class GateOfTwo(nn.Module):
    """A module without children that takes two tensors, one of them through a function."""

    def forward(self, x, gate):
        return x * F.silu(gate)


def functional(m, x):
    return m.c(torch.tanh(m.b(F.relu(m.a(x))))).sigmoid()


def linears(**more):
    return {**{name: nn.Linear(4, 4) for name in "abc"}, **more}


def encoder(activation=F.relu):
    layer = nn.TransformerEncoderLayer(4, 2, 12, dropout=0.0, batch_first=True, activation=activation)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


X, TOKENS = torch.randn(20, 4), torch.randn(20, 3, 4)
HERE = "in the model's forward"
FUNCTIONS = {  # model, example, functions among activation calls, what is named
    "functional": (
        lambda: Model(lambda m, x: m.act(functional(m, x)), **linears(act=nn.GELU())),
        X,
        "3 of 4",
        f"F.relu {HERE} (after='a'), torch.tanh {HERE} (after='b'), Tensor.sigmoid {HERE} (after='c')",
    ),
    "in place": (
        lambda: Model(
            lambda m, x: m.act(torch.relu_(m.a(x) + x)) + F.elu(m.b(x), inplace=True), **linears(act=nn.Mish())
        ),
        X,
        "2 of 3",
        f"F.relu_ {HERE}, F.elu {HERE}",
    ),
    "gated block": (
        lambda: nn.Sequential(Gated(), nn.Linear(4, 4), nn.ELU()),
        TOKENS,
        "1 of 2",
        "F.gelu in '0' (after='0.up')",
    ),
    "gate of two": (
        lambda: Model(lambda m, x: m.gate(m.act(m.a(x)), m.b(x)), **linears(act=nn.Tanh(), gate=GateOfTwo())),
        X,
        "1 of 2",
        "F.silu in 'gate' (after='b')",
    ),
    "encoder": (
        lambda: nn.Sequential(encoder(), nn.Linear(4, 4), nn.ReLU()),
        TOKENS,
        "2 of 3",
        "F.relu in '0.layers.0' (after='0.layers.0.linear1'), F.relu in '0.layers.1' (after='0.layers.1.linear1')",
    ),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_are_told_with_their_place_and_the_remedy(case):
    make, example, count, named = FUNCTIONS[case]
    told = f"{count} activation calls are functions, and get no VCL: {named}. Make them modules"
    with pytest.warns(vk.VCLWarning, match=re.escape(told)) as warned:
        handle = vk.attach(make(), example[:2])
    assert len(warned) == 1
    assert str(handle).count("left out  a function") == int(count[0])
    after = re.findall(r"after='([\w.]+)'", named)
    if len(after) == int(count[0]):
        assert len(vk.attach(make(), example[:2], after=after).layers) == int(count[-1])  # without a warning


@pytest.mark.parametrize(("make", "example", "first"), [
    (lambda: Model(functional, **linears()), X, f"F.relu {HERE} (after='a')"),
    (encoder, TOKENS, "F.relu in 'layers.0' (after='layers.0.linear1')"),
])  # fmt: skip
def test_a_model_of_functions_alone_is_an_error_that_names_them(make, example, first):
    with pytest.raises(ValueError, match=re.escape(f"no activation modules: its activations are functions: {first}, ")):
        vk.attach(make(), example[:2])
    with pytest.raises(ValueError, match="Pass an example_input to find activations that are called as"):
        vk.attach(make())


def test_no_more_than_six_functions_are_written():
    net = Model(
        lambda m, x: [torch.tanh(getattr(m, f"l{i}")(x)) for i in range(9)],
        **{f"l{i}": nn.Linear(4, 4) for i in range(9)},
    )
    with pytest.raises(ValueError, match=r"after='l5'\) and 3 more\."):
        vk.attach(net, X)


NAMES = ["layers.0.linear1", "layers.1.linear1"]


@pytest.mark.parametrize("inject", [True, False])
@pytest.mark.parametrize("after", [
    lambda _: NAMES,
    lambda net: [net.get_submodule(name) for name in NAMES],
    lambda _: lambda name, module: isinstance(module, nn.Linear) and name.endswith("linear1"),
], ids=["names", "modules", "predicate"])  # fmt: skip
def test_loss_and_gradient_of_outputs_are_those_by_hand(after, inject):
    net = encoder()
    plain, losses = copy.deepcopy(net), []
    handle = vk.attach(net, TOKENS[:2], after=after(net), weight=0.3, inject=inject, **LEARNED)
    assert [(name, vcl.channel_dim, vcl.beta.shape) for name, vcl in handle.layers.items()] == [
        (name, -1, (12,)) for name in NAMES
    ]
    loss = net(TOKENS).square().mean()
    (loss if inject else loss + handle.loss()).backward()
    for name in NAMES:
        plain.get_submodule(name).register_forward_hook(
            lambda _m, _x, y: losses.append(vk.reference.vcl_loss(y.transpose(1, 2)))
        )
    (plain(TOKENS).square().mean() + 0.3 * sum(losses)).backward()
    torch.testing.assert_close(handle.loss(), 0.3 * sum(losses).detach() if inject else 0.3 * sum(losses))
    torch.testing.assert_close(
        {name: p.grad for name, p in net.named_parameters() if "vcl" not in name},
        {name: p.grad for name, p in plain.named_parameters()},
    )
    assert all(beta.grad.abs().sum() > 0 for beta in handle.parameters())
    net.eval()
    torch.testing.assert_close(net(TOKENS), plain.eval()(TOKENS))
    handle.remove()
    assert list(net.state_dict()) == list(plain.state_dict())


def test_after_stands_beside_the_activations_or_alone():
    net = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1))
    assert repr(vk.attach(copy.deepcopy(net), X[:, :1], after=["0"])) == "VCLHandle(1, 0)"
    handle = vk.attach(net, X[:, :1], after="0", layers=[], weight=1.0, **LEARNED)
    pre = net[0](X[:, :1])
    net(X[:, :1])
    assert list(handle.losses) == ["0"]
    torch.testing.assert_close(handle.loss(), vk.vcl_loss(pre, 1.0))


def turned(m, x):  # channels last, then first
    tokens = m.act(m.a(x[:, None].repeat(1, 4, 1)))
    return m.act(tokens.mT.contiguous().clone().mT.unflatten(2, (4, 1)).flatten(2))


def overwritten(m, x):
    return F.relu(m.a(x), inplace=True)


@pytest.mark.parametrize(("net", "options", "message"), [
    (Model(overwritten, **linears()), {"after": ["a"]}, "after names 'a', and a later .* overwrites its output"),
    (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), {"after": ["0"]}, "after names '0', .* overwrites"),
    (Model(lambda m, x: m.act((10 * x).int()), act=nn.ReLU()), {"layers": ["act"]}, "values of torch.int32"),
    (Model(turned, **linears(act=nn.ELU())), {"shared_beta": True}, "channels in the same dimension"),
    (nn.Sequential(nn.ReLU()), {"after": ["0"], "layers": ["0"]}, "'0' is in layers= and in after="),
    (nn.Sequential(nn.ReLU()), {"after": []}, "after must choose at least one module"),
    (nn.Sequential(nn.ReLU()), {"after": lambda *_: False}, "after must choose at least one module"),
    (nn.Sequential(nn.ReLU()), {"after": ["1"]}, "after must name modules of the model; got '1'"),
    (nn.Sequential(nn.ModuleList([nn.ReLU()])), {"after": ["0"]}, "after must not name a container; '0' is one"),
    (nn.Sequential(nn.LSTM(4, 4)), {"after": ["0"]}, "after names '0', which has tuple where"),
])  # fmt: skip
def test_errors(net, options, message):
    names = list(net.state_dict())
    with pytest.raises(ValueError, match=message):
        vk.attach(net, X, **options)
    assert list(net.state_dict()) == names
    assert not any(hasattr(module, "vcl") for module in net.modules())


class Helper:
    def __init__(self, *modules):
        self.modules = modules

    def __call__(self, x):
        for module in self.modules:
            x = module(x)
        return x


@pytest.mark.parametrize("way", [
    lambda *modules: list(modules),
    lambda *modules: dict(enumerate(modules)),
    lambda *modules: [Helper(*modules)],
], ids=["list", "dict", "helper"])  # fmt: skip
def test_children_that_are_reached_by_another_way_get_vcl(way):
    net = Model(None, **linears(first=nn.ReLU(), second=nn.Softplus()))
    net.__dict__["way"] = way(net.a, net.first, net.b, net.second)
    net.__dict__["steps"] = lambda m, x: Helper(*(m.way.values() if isinstance(m.way, dict) else m.way))(x)
    handle = vk.attach(net, X[:2], weight=1.0, **LEARNED)
    assert repr(handle) == "VCLHandle(first, second)"
    net(X)
    pre = net.a(X)
    torch.testing.assert_close(handle.loss(), vk.vcl_loss(pre, 1.0) + vk.vcl_loss(net.b(pre.relu()), 1.0))


def test_an_activation_whose_forward_is_called_by_itself_is_told():
    net = Model(lambda m, x: m.act.forward(m.a(x)), **linears(act=nn.Mish()))
    with (
        pytest.warns(match="the example does not reach act. Betas"),
        pytest.warns(match="F.mish in the model's forward"),
    ):
        vk.attach(net, X[:2])


def test_activations_that_are_not_in_the_model_are_named():
    outside = Helper(nn.GELU(), Gated(), nn.Dropout())
    net = Model(lambda m, x: outside(m.a(x)), **linears())
    with pytest.raises(ValueError, match="no activation modules: its activations are functions: F.gelu in Gated"):
        vk.attach(net, X)
    outside.modules = outside.modules[:1]
    with pytest.raises(ValueError, match=r"left out are GELU in the model's forward \(after='a'\): not in the model"):
        vk.attach(net, X)
    net.act, net.steps = nn.Tanh(), lambda m, x: m.act(outside(m.a(x)))
    with pytest.warns(
        vk.VCLWarning, match=r"not in the model: GELU in the model's forward \(after='a'\). They get no VCL"
    ):
        handle = vk.attach(net, X)
    assert "GELU in the model's forward (after='a')  left out  not in the model" in str(handle)
    assert vk.attach(Model(net.steps, act=nn.Tanh(), a=nn.Linear(4, 4)), X, after=["a"]).losses == {}


class Overwriting(nn.Module):
    """Works in place and does not say so."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("inject", [True, False])
@pytest.mark.parametrize(("function", "how"), [(torch.relu_, "fused"), (F.hardtanh_, "before"), (F.selu_, "before")])
def test_an_activation_that_overwrites_its_input_without_saying_so(function, how, inject):
    net = nn.Sequential(nn.Linear(4, 4), Overwriting(function), nn.Linear(4, 4))
    plain = copy.deepcopy(net)
    handle = vk.attach(net, X[:2], weight=0.3, inject=inject, **LEARNED)
    assert how in str(handle)
    y = net(X)
    loss = y.square().mean()
    (loss if inject else loss + handle.loss()).backward()
    pre = plain[0](X)
    expected = plain[2](function(pre.clone()))
    (expected.square().mean() + 0.3 * vk.reference.vcl_loss(pre)).backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        [p.grad for p in net.parameters() if p.shape != (4,)], [p.grad for p in plain.parameters() if p.shape != (4,)]
    )


class Sloped(nn.ReLU):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


def test_an_activation_that_gets_further_arguments_is_hooked():
    net = Model(lambda m, x: m.act(m.a(x), 3.0), **linears(act=Sloped()))
    handle = vk.attach(net, X[:2], weight=1.0, **LEARNED)
    assert "before" in str(handle)
    pre = net.a(X)
    torch.testing.assert_close(net(X), 3 * pre.relu())
    torch.testing.assert_close(handle.loss(), vk.vcl_loss(pre, 1.0))


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.linear(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_activations_that_torch_jit_compiled_are_told():
    scripted = [torch.jit.script(module) for module in (Scripted(), nn.GELU(), nn.Linear(4, 4))]
    with pytest.warns(vk.VCLWarning, match=r"torch.jit compiled 2, 3, and activations in them get no VCL"):
        handle = vk.attach(nn.Sequential(nn.Linear(4, 4), nn.ELU(), *scripted), X[:2])
    assert repr(handle) == "VCLHandle(1)"
    assert "Scripted    left out  compiled by torch.jit" in str(handle)
    with pytest.raises(ValueError, match="left out are 0: compiled by torch.jit"):
        vk.attach(nn.Sequential(scripted[0]), X[:2])


def test_the_table():
    steps = lambda m, x: F.elu(m.act2(m.c(m.act1(m.b(m.act1(m.a(x)))))) + m.act3(x.mean()))  # noqa: E731
    net = Model(steps, **linears(act1=nn.CELU(), act2=nn.Softplus(), act3=nn.Mish()))
    with pytest.warns(vk.VCLWarning, match="1 of 5 activation calls are functions"):
        handle = vk.attach(net, TOKENS[:2], after=["a"], channel_dim=None, **LEARNED)
    assert (
        str(handle)
        == """\
layer   activation                    vcl       beta
act1    CELU (elu)                    fused     (4,), channel_dim=-1
act1:1  CELU (elu)                    fused     (4,), channel_dim=-1
act2    Softplus                      before    (4,), channel_dim=-1
act3    Mish                          left out  a 0-D tensor where (N, C, …) is wanted
a       Linear                        after     (4,), channel_dim=-1
-       F.elu in the model's forward  left out  a function
4 layers with VCL: 2 fused, 1 before, 1 after; 2 left out"""
    )
    assert repr(handle) == "VCLHandle(act1, act2, a)"


def made(function):
    class Act(nn.Module):
        def forward(self, x):
            x = function(x)
            return self.soft(x) if hasattr(self, "soft") else x

    return Act


def test_modules_that_look_alike_are_told_apart():
    kinds = [made(function) for function in (torch.relu, torch.tanh)]
    acts = [kinds[0](), kinds[1](), kinds[0]()]
    acts[2].soft = nn.Softmax(-1)
    net = nn.Sequential(*(layer for act in acts for layer in (nn.Linear(4, 4), act)))
    expected = net(X)
    with pytest.warns(vk.VCLWarning, match="torch.relu in '5'"):  # relu and softmax: no activation
        assert repr(vk.attach(net, X[:2])) == "VCLHandle(1, 3)"
    torch.testing.assert_close(net(X), expected)

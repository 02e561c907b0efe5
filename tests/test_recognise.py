"""Which modules are taken for activations, and which of those are fused: by what they compute, not by their class."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from common import LEARNED, Model
from torch import nn

import vcl_kernels as vk
from vcl_kernels.nn.recognise import UnknownError, recognise


def found(module, like=None):
    """The name of the fused activation with its parameter, "hooked", "unknown", or None for no activation."""
    try:
        recognised = recognise(module, like)
    except UnknownError:
        return "unknown"
    if recognised is None:
        return None
    fused = recognised.fused
    if fused is None:
        return "hooked"
    return (fused.name, fused.parameter) if fused.name in ("elu", "leaky_relu") else fused.name


def only_images(_, x):
    assert x.dim() == 4
    return x.relu()


class MishByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.mish(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        t, s = F.softplus(x).tanh(), x.sigmoid()
        return dy * (t + x * s * (1 - t * t))


def snake(m, x):
    return x + (m.a * x).sin() ** 2 / m.a


def parameter(*shape):
    return nn.Parameter(torch.full(shape, 0.7))


TORCH = {
    nn.ReLU(): "relu",
    nn.Threshold(0.0, 0.0): "relu",
    nn.LeakyReLU(0.0): "relu",
    nn.LeakyReLU(): ("leaky_relu", 0.01),
    nn.LeakyReLU(1 / 3): ("leaky_relu", 1 / 3),
    nn.LeakyReLU(-0.7): ("leaky_relu", -0.7),
    nn.ELU(): ("elu", 1.0),
    nn.ELU(0.3): ("elu", 0.3),
    nn.CELU(): ("elu", 1.0),
    nn.GELU(): "gelu",
    nn.GELU("tanh"): "gelu_tanh",
    nn.SiLU(): "silu",
    nn.Tanh(): "tanh",
    **dict.fromkeys((nn.CELU(2.0), nn.SELU(), nn.Mish(), nn.Softplus(), nn.Softsign(), nn.Tanhshrink()), "hooked"),
    **dict.fromkeys((nn.Sigmoid(), nn.LogSigmoid(), nn.Softshrink(), nn.Hardshrink(), nn.Hardshrink(3.0)), "hooked"),
    **dict.fromkeys((nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(0, 1), nn.Hardsigmoid(), nn.Hardswish()), "hooked"),
    **dict.fromkeys((nn.Threshold(0.1, 20), nn.Threshold(-1, 0), nn.PReLU(), nn.PReLU(5)), "hooked"),
    **dict.fromkeys((nn.Hardtanh(-9, 9), nn.Threshold(9.0, 0.0)), "hooked"),
    nn.RReLU(): "hooked",  # in training it is random
}


@pytest.mark.parametrize("module", TORCH, ids=str)
def test_activations_of_torch(module):
    assert found(module) == TORCH[module]


@pytest.mark.parametrize("kind", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.ReLU6, nn.Hardswish, nn.Mish, nn.CELU])
def test_what_works_in_place_is_seen_as_the_same(kind):
    plain, in_place = recognise(kind()), recognise(kind(inplace=True))
    assert plain.fused == in_place.fused
    assert (plain.in_place, in_place.in_place) == (False, True)


BY_HAND = {
    "silu": (Model(lambda _, x: x * x.sigmoid()), "silu"),
    "quick gelu": (Model(lambda _, x: x * (1.702 * x).sigmoid()), "hooked"),
    "gelu": (Model(lambda _, x: 0.5 * x * (1 + (x / 2**0.5).erf())), "gelu"),
    "clipped gelu": (Model(lambda _, x: F.gelu(x).clamp(max=10)), "hooked"),
    "gelu in float32": (Model(lambda _, x: F.gelu(x.float()).type_as(x)), "hooked"),
    "relu to float32": (Model(lambda _, x: F.relu(x.float())), "hooked"),
    "relu": (Model(lambda _, x: x.clamp(min=0)), "relu"),
    "relu in training": (Model(lambda m, x: F.leaky_relu(x, 0.1) if m.training else x.relu()), "hooked"),
    "squared relu": (Model(lambda _, x: x.relu().square()), "hooked"),
    "sine": (Model(lambda _, x: (30 * x).sin()), "hooked"),
    "soft cap": (Model(lambda _, x: 30 * (x / 30).tanh()), "hooked"),
    "backward by hand": (Model(lambda _, x: MishByHand.apply(x)), "hooked"),
    "gradient of another": (Model(lambda _, x: F.relu(x).detach() + F.gelu(x) - F.gelu(x).detach()), None),
    **{f"snake {s}": (Model(snake, a=parameter(*s)), "hooked") for s in ((5,), (1, 4, 1), (5, 1, 1), (1, 1, 1, 1))},
    "snake viewed": (Model(lambda m, x: x + (m.a.view(1, -1, 1, 1) * x).sin() ** 2, a=parameter(5)), "hooked"),
    "dynamic tanh": (
        Model(lambda m, x: (m.a * x).tanh() * m.w + m.b, a=parameter(1), w=parameter(5), b=0),
        "hooked",
    ),
    "images": (Model(only_images), "relu"),
    "a setting": (Model(lambda m, x: F.leaky_relu(x, m.slope), slope=0.2), ("leaky_relu", 0.2)),
    "a list of settings": (Model(lambda m, x: F.leaky_relu(x, m.slopes[0]), slopes=[0.2]), "hooked"),
    "a constant tensor": (Model(lambda m, x: F.leaky_relu(x) * m.one, one=torch.ones(())), "hooked"),
    "no copy": (Model(lambda _, x: x.relu(), lock=threading.Lock()), "hooked"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_activations_by_hand(name):
    module, wanted = BY_HAND[name]
    assert found(module) == wanted


def quantised(_, x):
    return x + (x.mul(16).round() / 16 - x).detach()


def sign_through(_, x):
    clipped = x.clamp(-1, 1)
    return clipped + (x.sign() - clipped).detach()


def only_positive(_, x):
    if (x <= 0).any():
        raise ValueError("x must be positive")
    return x.sqrt()


def masked(m, x):
    return x.masked_fill(m.mask[: x.shape[-1]], -1e9)


OTHERS = {
    "dropout": nn.Dropout(),
    "dropout 2d": nn.Dropout2d(),  # warns of 2-D tensors
    "alpha dropout": nn.AlphaDropout(),
    "dropout always": Model(lambda _, x: F.dropout(x, 0.5, True)),
    "noise": Model(lambda _, x: x.relu() + torch.rand_like(x)),
    "random relu": Model(lambda _, x: F.rrelu(x, training=True)),
    "identity": nn.Identity(),
    "slope of 1": nn.LeakyReLU(1.0),
    "bounds of a dtype": nn.Hardtanh(-65504, 65504),
    "cast": Model(lambda _, x: x.float().double()),
    "scale": Model(lambda m, x: m.scale * x, scale=parameter(5)),
    "scale of images": Model(lambda m, x: m.scale * x, scale=parameter(5, 1, 1)),
    "exponential scale": Model(lambda m, x: m.scale.exp() * x, scale=parameter()),
    "bias": Model(lambda m, x: m.bias + x, bias=parameter(5)),
    "mask": Model(masked, mask=torch.rand(100) < 0.5),
    "mask in place": Model(lambda _, x: x.masked_fill_(torch.ones(x.shape[1:]).tril().bool(), 0.0)),
    "softmax": nn.Softmax(1),
    "log softmax": nn.LogSoftmax(-1),
    "layer norm": nn.LayerNorm(6),
    "rms norm": nn.RMSNorm(6),
    "batch norm": nn.BatchNorm1d(6),
    "batch norm 2d": nn.BatchNorm2d(6, affine=False),
    "group norm": nn.GroupNorm(2, 6),
    "instance norm": nn.InstanceNorm1d(6),  # warns of a wrong number of features
    "response norm": nn.LocalResponseNorm(2),
    "length 1": Model(lambda _, x: F.normalize(x, dim=1)),
    "maximum": nn.MaxPool2d(3, 1, 1),
    "pooling": nn.AdaptiveAvgPool2d(1),
    "stub": torch.ao.quantization.QuantStub(),
    "fake quantisation": torch.ao.quantization.FakeQuantize(),
    "observer": torch.ao.quantization.MinMaxObserver(),
    "straight through": Model(quantised),
    "sign straight through": Model(sign_through),
    "sign": Model(lambda _, x: x.sign()),
    "round": Model(lambda _, x: x.round()),
    "roll": Model(lambda _, x: x.relu().roll(1, 1)),
    "sum over rows": Model(lambda _, x: x.relu().cumsum(0)),
    "shuffle": nn.ChannelShuffle(2),
    "positive": Model(only_positive),
    "logarithm": Model(lambda _, x: x.log()),
    "integers": Model(lambda _, x: x.long()),
    "a tuple": Model(lambda _, x: (x.relu(),)),
    "two halves": Model(lambda _, x: torch.cat([x.relu(), (-x).relu()], 1)),
    "gated": nn.GLU(),
    "flatten": nn.Flatten(),
    "children": nn.Sequential(nn.ReLU()),
    "linear": nn.Linear(6, 6),
    "linear to 1": nn.Linear(6, 1),
    "convolution": nn.Conv1d(6, 6, 1, groups=6),
    "lazy": nn.LazyLinear(3),
    "embedding": nn.Embedding(5, 6),
    "lstm": nn.LSTM(6, 6),
    "vcl": vk.VCLActivation("relu"),
}
UNKNOWN = {
    "two arguments": nn.L1Loss(),
    "raises": Model(lambda *_: 1 // 0),
    "own size": Model(lambda _, x: x.view(2, 3, 7).relu().view(2, 21)),
    "linear of 1": nn.Linear(1, 1),
    "an embedding of one": nn.Embedding(1, 1),
    "no forward": nn.ModuleDict(),
    "a long vector": Model(lambda m, x: m.w * x, w=torch.ones(1 << 16)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_no_activations(name):
    assert found(OTHERS[name]) is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_takes_no_drawn_tensor_is_unknown(name):
    assert found(UNKNOWN[name]) == "unknown"


def counting(m, x):
    m.count += 1
    m.total += x.sum()
    return x.relu()


@pytest.mark.parametrize("training", [True, False])
def test_recognition_leaves_no_trace(training):
    modules = nn.ModuleList([Model(counting, count=0), nn.BatchNorm1d(6), nn.RReLU(inplace=True), nn.PReLU(3)])
    modules[0].register_buffer("total", torch.zeros((), dtype=torch.float16))
    modules.append(Model(lambda m, x: x.relu() if m.training else -x, lock=threading.Lock()))  # has no copy
    modules.train(training)
    before, attributes, drawn = copy.deepcopy(modules.state_dict()), vars(modules[0]).copy(), torch.get_rng_state()
    assert [found(module) for module in modules] == ["hooked", None, "hooked", "hooked", None]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert vars(modules[0]) == attributes
    assert all(module.training is training for module in modules)
    for name, value in modules.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert not any(module._forward_hooks for module in modules)  # noqa: SLF001


def own_size(_, x):
    return x.view(-1, 3, 7).relu().view(-1, 21)


class OwnSizeInPlace(nn.Module):
    def forward(self, x):
        return x.view(-1, 3, 7).relu_().view(-1, 21)


@pytest.mark.parametrize("act", [Model(own_size), OwnSizeInPlace()])
def test_one_that_takes_its_real_shape_alone_is_found_by_the_example(act):
    net, x = nn.Sequential(nn.Linear(4, 21), act, nn.Linear(21, 1), nn.Linear(1, 1)), torch.randn(20, 4)
    pre = net[0](x)
    assert found(act, pre[:2]) == "hooked"
    with pytest.raises(ValueError, match="no activation modules"):
        vk.attach(net)
    handle = vk.attach(net, x[:2], weight=1.0, **LEARNED)
    assert str(handle).splitlines()[1:] == [
        f"1      {type(act).__name__.ljust(10)}  before  (21,)",
        "1 layer with VCL: 1 before",
    ]
    torch.testing.assert_close(net[1](pre), pre.relu())
    net(x)
    torch.testing.assert_close(handle.loss(), vk.vcl_loss(pre, 1.0))


def test_one_whose_parameter_is_on_meta():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 6), Model(snake, a=parameter(6)), nn.Linear(6, 6), nn.GELU())
        scale = Model(lambda m, x: m.scale * x, scale=parameter(5))
        assert found(scale) is None
        assert found(net[1]) == "hooked"
        assert repr(vk.attach(net, torch.empty(2, 4))) == "VCLHandle(1, 3)"
    assert net[1].a.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_in_another_precision(dtype):
    assert found(Model(snake, a=parameter(5)).to(dtype)) == "hooked"
    assert found(Model(lambda m, x: m.a * x, a=parameter(5)).to(dtype)) is None
    like = torch.randn(6, 21).to(dtype)
    assert found(Model(own_size), like) == "hooked"
    assert found(Model(lambda _, x: 3 * x.view(-1, 3, 7).view(-1, 21)), like) is None


def test_a_private_setting_that_changes_is_taken_over():
    act, x = Model(lambda m, x: F.leaky_relu(x, vars(m)["_slope"]), _slope=0.2), torch.randn(20, 8)
    assert found(act) == ("leaky_relu", 0.2)
    net = nn.Sequential(nn.Linear(4, 8), act)
    vk.attach(net, torch.randn(2, 4))
    vars(act)["_slope"] = 0.6
    torch.testing.assert_close(act(x.requires_grad_()), F.leaky_relu(x, 0.6))


class Teacher:
    """Something large that a module refers to."""

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


def test_a_trial_costs_little_and_changes_nothing():
    module, values = Model(lambda m, x: m.seen.append(x.numel()) or x.tanh()), []
    module.seen, module.teacher = values, Teacher()
    assert recognise(module) is not None
    assert values == []
    large = Model(lambda _, x: values.append(x.numel()) or F.interpolate(x, size=9))
    assert recognise(large) is None
    assert sum(values) < 1000

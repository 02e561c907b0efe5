"""remove_batch_norm: what it refuses, with the model unchanged."""

import itertools
import threading
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import Model
from normed import NormAct, Own, Residual, X, cnn, dynamic, each, hooked, parts, steps, with_norm, without_statistics
from torch import nn

import vcl_kernels as vk

pytestmark = pytest.mark.usefixtures("one_thread")


class OwnCall(nn.BatchNorm2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OwnBuffer(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("centres", torch.zeros(channels))


class Slots(nn.BatchNorm2d):
    __slots__ = ("more",)


class ActThenNorm(NormAct):
    def forward(self, x):
        return nn.BatchNorm2d.forward(self, self.act(x))


def with_state_hook():
    net = cnn()
    net[1].register_state_dict_pre_hook(lambda *_: None)
    return net


def quantisation_aware():
    qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return nn.Sequential(torch.ao.nn.intrinsic.qat.ConvBn2d(3, 4, 3, qconfig=qconfig))


def unregistered(container):
    net = Model(each, conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3))
    net.parts = container([net.conv, nn.BatchNorm2d(3)])
    return net


def stored_forward():
    net = Model(lambda m, x: m.call(m.conv(x)), **parts())
    net.call = net.bn.forward
    return net


def scripted():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net[1] = torch.jit.script(net[1])
    return net


def by_class(m, x):
    for module in m.children():
        if isinstance(module, nn.BatchNorm2d):
            x = 2 * module(x)
        elif isinstance(module, nn.Conv2d):
            x = module(x)
    return x


def by_class_in_training(m, x):
    return by_class(m, x) if m.training else m.bn(m.conv(x))


def by_class_and_method(m, x):
    names = [name for name, _ in m.named_buffers()]
    return m.bn(m.conv(x)) if "bn.running_mean" in names else m.conv.no_such_method(x)


def number_of_parameters(m, x):
    return m.bn(m.conv(x)) * len(list(m.bn.parameters()))


def of_state(m, x):
    return m.bn(m.conv(x)) * m.bn.state_dict()["weight"].view(1, -1, 1, 1)


def closure_that_reads():
    net = Model(lambda m, x: m.call(x) if x.sum() != 99 else x, **parts())
    net.call = lambda x: times_weight(net, x)
    return net


def hook_that_reads():
    net = cnn()
    net.register_forward_hook(lambda m, _args, y: y * m[1].weight.sum())
    return net


class AlwaysTrains(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(mode or True)


def parametrized():
    net = cnn()
    nn.utils.parametrize.register_parametrization(net[1], "weight", nn.Tanh())
    return net


def in_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class Shared(nn.Sequential):
    def __deepcopy__(self, memo):
        return self


def copies_as_itself():
    return nn.Sequential(Shared(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU())


def all_parameters(m, x):
    return m.bn(m.conv(x)) * sum(p.sum() for p in m.parameters())


def asks_in_training(m, x):
    return m.bn(m.conv(x)) + (m.bn.weight.sum() if m.training else 0)


def functional(m, x):
    return F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var)


def in_a_loop(m, x):
    for bn in [m.bn]:
        x = (x - bn.running_mean.view(1, -1, 1, 1)) if x.abs().max() < 100 else x
    return x


def times_weight(m, x):
    return m.bn(m.conv(x)) * m.bn.weight.view(1, -1, 1, 1)


WITH_EXAMPLE, BOTH = [X], [None, X]
REFUSED = {
    "none": (lambda: nn.Sequential(nn.Linear(8, 3), nn.LayerNorm(3)), BOTH, "model .Sequential. has no batch norm"),
    "no statistics": (without_statistics, BOTH, "BatchNorm2d, '2', without running statistics .*zeros and ones"),
    "lazy": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()),
        [None],
        "LazyBatchNorm2d, '1', that has not seen any input",
    ),
    "own forward": (lambda: with_norm(nn.Conv2d(3, 4, 3), Own), BOTH, "Own, '1', with a forward of its own"),
    "own call": (lambda: with_norm(nn.Conv2d(3, 4, 3), OwnCall), BOTH, "OwnCall, '1', with a __call__ of its own"),
    "own buffer": (lambda: with_norm(nn.Conv2d(3, 4, 3), OwnBuffer), BOTH, r"buffers of its own \(centres\)"),
    "slots": (lambda: with_norm(nn.Conv2d(3, 4, 3), Slots), BOTH, "Slots, '1', with __slots__"),
    "other order": (
        lambda: with_norm(nn.Conv2d(3, 4, 3), ActThenNorm),
        BOTH,
        "children that are not simply run after it",
    ),
    "hooks": (lambda: hooked(cnn(), 5), BOTH, "BatchNorm2d, '5', with hooks"),
    "state hooks": (with_state_hook, BOTH, "BatchNorm2d, '1', with hooks"),
    "scripted": (scripted, BOTH, "scripted batch norm, '1'; remove it before"),
    "in a list alone": (partial(unregistered, list), BOTH, "BatchNorm2d in parts, and not among its modules"),
    "in a dict alone": (partial(unregistered, lambda x: {"a": x}), BOTH, "BatchNorm2d in parts, and not among"),
    "weight": (steps(times_weight), BOTH, "reads 'weight' of BatchNorm2d 'bn', and not only calls it"),
    "eps": (steps(lambda m, x: m.bn(m.conv(x)) * m.bn.eps), BOTH, "reads 'eps'"),
    "in training": (steps(asks_in_training), BOTH, "reads 'weight'"),
    "functional": (steps(functional), BOTH, "reads 'running_mean'"),
    "a method": (steps(lambda m, x: m.bn.reset_running_stats() or m.bn(x)), BOTH, "calls methods of BatchNorm2d"),
    "stored forward": (stored_forward, BOTH, "calls methods of BatchNorm2d 'bn'"),
    "qat": (quantisation_aware, BOTH, "reads 'running_var' of BatchNorm2d '0.bn'"),
    "dynamic, weight": (dynamic(times_weight), WITH_EXAMPLE, "reads 'weight'"),
    "dynamic, in training": (dynamic(asks_in_training), WITH_EXAMPLE, "reads 'weight'"),
    "by class, traced": (
        steps(by_class),
        [None],
        "traced on a copy, takes other steps after its batch",
    ),
    "number of parameters": (steps(number_of_parameters), BOTH, "after its batch norms are removed"),
    "state dict": (steps(of_state), BOTH, "raises KeyError"),
    "closure": (closure_that_reads, WITH_EXAMPLE, "of BatchNorm2d 'bn', and not only calls it"),
    "hook": (hook_that_reads, WITH_EXAMPLE, "reads 'weight' of BatchNorm2d '1'"),
    "always trains": (lambda: with_norm(nn.Conv2d(3, 4, 3), AlwaysTrains), BOTH, "a train.. that keeps it in training"),
    "parametrized": (parametrized, BOTH, "with parametrizations"),
    "inference": (in_inference_mode, BOTH, "was made in torch.inference_mode"),
    "copies as itself": (copies_as_itself, WITH_EXAMPLE, "a part of it copies as itself, .* Leave it out"),
    "by class": (
        steps(by_class),
        WITH_EXAMPLE,
        "moves by .* in evaluation after its batch norms are removed",
    ),
    "by class, in training": (steps(by_class_in_training), WITH_EXAMPLE, "moves by .* in training after"),
    "by class, a method": (steps(by_class_and_method), WITH_EXAMPLE, "raises AttributeError: .*, in evaluation after"),
    "all parameters": (steps(all_parameters), WITH_EXAMPLE, "moves by"),
    "random": (steps(lambda m, x: m.bn(x) * next(NUMBERS)), WITH_EXAMPLE, "differs from one call to the next"),
    "no copies": (
        steps(lambda m, x: m.bn(x), lock=threading.Lock()),
        WITH_EXAMPLE,
        "cannot be copied .TypeError: .*Leave it out",
    ),
}
NUMBERS = itertools.count()


@pytest.mark.parametrize(("case", "i"), [(case, i) for case in REFUSED for i in range(len(REFUSED[case][1]))])
def test_refused_and_unchanged(case, i):
    make, examples, message = REFUSED[case]
    net = make()
    modules = [(module, type(module), dict(vars(module))) for module in net.modules()]
    state = {name: (t, None if nn.parameter.is_lazy(t) else t.clone()) for name, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        vk.remove_batch_norm(net, examples[i])
    assert [(module, type(module), dict(vars(module))) for module in net.modules()] == modules
    for name, (tensor, value) in state.items():
        now = net.state_dict()[name]
        assert now is tensor if value is None else now.data_ptr() == tensor.data_ptr()
        assert value is None or torch.equal(now, value)


def hidden(m, x):
    return m.inner(x) if x.sum() else x


@pytest.mark.parametrize(
    ("methods", "found"),
    [
        ({"forward": lambda m, x: m.bn(x) * m.bn.weight if x.sum() else x}, "forward names 'bn.weight'"),
        (
            {"forward": lambda m, x: m.bn(x) if x.sum() and isinstance(m.bn, nn.BatchNorm2d) else x},
            "forward names .*BatchNorm2d",
        ),
        ({"forward": in_a_loop}, "forward names 'bn.running_mean'"),
        ({"forward": lambda m, x: [norm.reset_running_stats() for norm in m.norms] if x.sum() else x}, "forward names"),
        ({"forward": lambda m, x: m.seq[1].weight if x.sum() else x}, "forward names"),
        ({"forward": lambda m, x: [norm := m.bn, norm.weight if x.sum() else x][1]}, "forward names 'norm.weight'"),
        ({"forward": torch.no_grad()(lambda m, x: m.bn.weight if x.sum() else x)}, "forward names 'bn.weight'"),
        ({"forward": lambda m, x: m.scale if x.sum() else x, "scale": property(lambda m: m.bn.weight)}, "scale names"),
        ({"forward": lambda m, x: m.call(x) if x.sum() else x, "call": None}, "call names 'bn.weight'"),
        ({"forward": hidden, "inner": lambda m, x: (lambda: m.bn.eps * x)()}, "inner names 'bn.eps'"),
    ],
)
def test_code_that_cannot_be_followed_is_looked_at(methods, found):
    def unrelated(m):
        return m.bn.weight

    net = type("Coded", (Residual,), {**methods, "unrelated": unrelated})()
    net.conv, net.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
    if "call" in methods:
        net.call = lambda x: x * net.bn.weight
    with pytest.raises(ValueError, match=f"cannot be traced .*, and Coded.{found}.*Pass an example_input"):
        vk.remove_batch_norm(net)
    assert isinstance(net.bn, nn.BatchNorm2d)


def test_an_example_that_does_not_fit_is_told_by_the_model():
    net = cnn()
    with pytest.raises(RuntimeError, match="expected input.* to have 3 channels"):
        vk.remove_batch_norm(net, X[:, :2])
    assert isinstance(net[1], nn.BatchNorm2d)


@pytest.mark.parametrize(("model", "what"), [(nn.BatchNorm2d, "the class BatchNorm2d"), ([], "a list")])
@pytest.mark.parametrize("change", [vk.attach, vk.remove_batch_norm])
def test_what_is_no_module(change, model, what):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module; got {what}"):
        change(model)

"""Models with batch norms, and what becomes of each: folded, or an affine map."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import Model
from torch import nn
from torch.utils.checkpoint import checkpoint

import vcl_kernels as vk
from vcl_kernels.nn.norms import BATCH_NORMS

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def cnn():
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(inplace=True)
    second = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
    return nn.Sequential(*first, nn.MaxPool2d(2), *second, nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10))


class Residual(nn.Module):
    """Two convolutions, two batch norms, and the forward of the subclass."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + x)


def variant(forward):
    """A residual network with another forward."""
    return type("Variant", (Residual,), {"forward": forward})


pre_activation = variant(lambda m, x: x + m.conv2(m.relu(m.bn2(m.conv1(m.relu(m.bn1(x)))))))


def shared_weight():
    net = variant(lambda m, x: m.bn1(m.conv1(x)) + m.conv2(m.bn2(x)))()
    net.conv2.weight = net.conv1.weight
    return net


def with_vcl():
    """What VCL does in training depends on the batch, and does not matter here."""
    net = variant(lambda m, x: m.bn2(m.conv2(m.vcl(m.bn1(m.conv1(x))).relu())))()
    net.vcl = vk.VCL(3)
    return net


def used_twice(m, x, use=1):
    h = m.conv1(x)
    y = m.bn2(m.conv2(m.bn1(h).relu()))
    return y if use is None else y + h


def used_twice_by_default(m, x, skip=None):
    return used_twice(m, x) if skip is None else used_twice(m, x, None) + skip


class Dynamic(nn.Module):
    """Its forward depends on values, so that it cannot be traced."""

    def __init__(self, *layers):
        super().__init__()
        self.seq = nn.Sequential(*layers)
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        h = self.seq(x)
        return self.bn(self.conv(h)) if h.sum() != 0 else h


def repeated():
    relu, conv = nn.ReLU(), nn.Conv2d(3, 3, 3)
    return Dynamic(relu, conv, relu, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))


def shared_block():
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    return Dynamic(block, nn.ReLU(), block)


def between():
    relu = nn.ReLU()
    return Dynamic(relu, nn.Conv2d(3, 3, 3), relu, nn.BatchNorm2d(3))


def with_norm(layer, norm=nn.BatchNorm2d, **options):
    """A network of a layer and a batch norm of its output's channels."""
    return nn.Sequential(layer, norm(getattr(layer, "out_channels", None) or layer.out_features, **options))


def without_statistics():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))


def with_given_statistics():
    net = without_statistics()
    net[2].running_mean, net[2].running_var = torch.zeros(4), torch.ones(4)
    return net


def hooked(net, index):
    net[index].register_forward_hook(lambda _module, _args, output: 2 * output)
    return net


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return with_norm(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))


def parts(**more):
    """A convolution, a batch norm, and what else."""
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), **more}


def steps(forward, **more):
    """A model of these parts and any forward, which can be traced."""
    return lambda: Model(forward, **parts(**more))


def dynamic(forward, **more):
    """The same with a forward that depends on values."""
    return steps(lambda m, x: forward(m, x) if x.abs().max() < 100 else forward(m, x / 100), **more)


def each(m, x):
    """Run what is in a container that is no module."""
    for module in m.parts:
        x = module(x)
    return x


def in_a(container):
    def make():
        net = Model(each, **parts())
        net.parts = container([net.conv, net.bn])
        return net

    return make


def in_a_dict():
    net = Model(lambda m, x: m.parts["all"][1](m.parts["all"][0](x)), **parts())
    net.parts = {"all": (net.conv, net.bn)}
    return net


def in_a_closure():
    net = Model(lambda m, x: m.call(x), **parts())
    net.call = lambda x: net.bn(net.conv(x))
    return net


def checkpointed(m, x):
    return checkpoint(m.block, x, use_reentrant=False)


def intermediate_results(m, x):
    outputs = []
    if x.abs().max() > 100:
        x = x / 100
    for module in m.enc:
        x = module(x)
        outputs.append(x)
    return x + outputs[0]


def encoder():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def kept(m, x):
    m.features = m.conv(x)
    return m.bn(m.features)


def two_weights_in_one_memory():
    net = Model(lambda m, x: m.bn(m.conv(x)) + m.other(x), **parts(other=nn.Conv2d(3, 3, 3, padding=1))).double()
    net.other.weight.data = net.conv.weight.data
    return net


def a_view_of_a_weight():
    net = Model(lambda m, x: m.bn(m.conv(x)) + m.view.mean(), **parts()).double()
    net.view = net.conv.weight.detach()[0]
    return net


def one_memory_for_all():
    net = cnn().double()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    begin = 0
    for p in net.parameters():
        p.data = flat[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    return net


def lazy():
    net = with_norm(nn.LazyConv2d(4, 3))
    net(X)
    return net


def observed():
    net = with_norm(nn.Conv2d(3, 4, 3))
    net[0].register_forward_hook(lambda *_: None)
    return net


def plus_skip(m, h, skips):
    return m.bn(h) + h if skips else m.bn(h)


def clamped(m, x):
    m.conv.weight.data.clamp_(-0.1, 0.1)
    return m.bn(m.conv(x))


def of_previous(m, x):
    previous, m.previous = getattr(m, "previous", 0), m.conv(x)
    return m.bn(m.previous) + previous


def forces(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m.bn(m.conv(x)).sin().sum(), x)[0]


def in_a_closure_with_modes():
    net = Model(lambda m, x: m.call(x), **parts())
    net.call = lambda x: plus_skip(net, net.conv(x), not net.training)
    return net


def of_type(m, x):
    return plus_skip(m, m.conv(x), type(m.bn).__module__.startswith(("torch.", "vcl_kernels.nn.affine")))


class Tied(nn.Module):
    """Uses the weight of a module that is not its child."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = [encoder]

    def forward(self, x):
        return F.conv_transpose2d(x, self.encoder[0].weight, padding=1)


def tied():
    net = Model(lambda m, x: m.decoder(m.bn(m.conv(x))), **parts())
    net.decoder = Tied(net.conv)
    return net


def through_a_replaced_forward():
    net = Model(lambda m, x: m.bn(m.conv(x)) + m.block(x), **parts())
    net.block = nn.Sequential(net.conv)
    forward = net.block.forward
    net.block.forward = lambda x: forward(x)
    return net


def with_a_graph_left():
    net = Model(lambda m, x: m.bn(m.conv(x)), **parts())
    net.last = SimpleNamespace(y=net.conv(X))
    return net


class WithOptions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)


class Flag(WithOptions):
    def forward(self, x, skips=False):
        return plus_skip(self, self.conv(x), skips is True)


class Keywords(WithOptions):
    def forward(self, x, **options):
        return plus_skip(self, self.conv(x), options.get("skips") is None)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True))


class Checked(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        assert input.dim() == 4


class AlwaysEvaluates(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(mode and False)


class NormAct(nn.BatchNorm2d):
    """A batch norm with children that follow, as those of timm are, and a forward of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


COUNT = itertools.count()
GROUPS = torch.cat((X, -2 * X), 1)
VOLUMES = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
spectral_norm = nn.utils.parametrizations.spectral_norm

# name: network, its input, and what becomes of each batch norm ("I": folded, "A": affine), in the network's order, by a
# trace alone; where an example_input shows more (or less), by that behind a "/"
CASES = {
    "cnn": (cnn, X, "IIA/III"),
    "residual": (Residual, X, "II"),
    "pre-activation": (pre_activation, X, "AI"),
    "in a block": (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), Residual()), X, "III"),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)), X, "A"),
    "alone": (lambda: nn.BatchNorm2d(3), X, "A"),
    "twice": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), X, "IA"),
    "channels_last": (lambda: cnn().to(memory_format=torch.channels_last), X, "IIA/III"),
    # Kinds of batch norm
    "sync": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(cnn()), X, "AAA/III"),
    "momentum=None": (lambda: with_norm(nn.Conv2d(3, 4, 3), momentum=None), X, "I"),
    "affine=False": (lambda: with_norm(nn.Conv2d(3, 6, 3), affine=False), X, "I"),
    "affine=False, affine": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False)), X, "A"),
    "3-D affine": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm3d(3)), VOLUMES, "A"),
    "statistics by hand": (with_given_statistics, X, "IA"),
    "subclass with a check": (lambda: with_norm(nn.Conv2d(3, 4, 3), Checked), X, "A/I"),
    "subclass with a mode": (lambda: with_norm(nn.Conv2d(3, 4, 3), AlwaysEvaluates), X, "I"),
    "activation inside": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), NormAct(4)), X, "IA"),
    # Layers before it
    "conv1d": (lambda: with_norm(nn.Conv1d(3, 6, 3), nn.BatchNorm1d), X[..., 0], "A/I"),
    "conv3d": (lambda: with_norm(nn.Conv3d(3, 6, 3), nn.BatchNorm3d), VOLUMES, "I"),
    "padded": (lambda: with_norm(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), X, "I"),
    "before a padded one": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), X, "A"),
    "grouped": (lambda: with_norm(nn.Conv2d(6, 4, 3, groups=2)), GROUPS, "I"),
    "depthwise": (lambda: with_norm(nn.Conv2d(3, 6, 3, groups=3)), X, "I"),
    "transposed": (lambda: with_norm(nn.ConvTranspose2d(3, 4, 3)), X, "I"),
    "transposed 1d": (lambda: with_norm(nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d), X[..., 0], "A/I"),
    "transposed, groups": (lambda: with_norm(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)), GROUPS, "I"),
    "lazy, has run": (lazy, X, "I"),
    "conv1d, unbatched, L = C": (lambda: with_norm(nn.Conv1d(3, 8, 1), nn.BatchNorm1d), X[0, :, 0], "A"),
    "sync, unbatched, H = C": (lambda: with_norm(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm), X[0], "A"),
    "spectral_norm": (lambda: with_norm(spectral_norm(nn.Conv2d(3, 4, 3))), X, "A"),
    "weight_norm": (lambda: with_norm(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), X, "A"),
    "old weight_norm": (old_weight_norm, X, "A"),
    "own subclass": (lambda: with_norm(Standardised(3, 4, 3)), X, "A"),
    "hooks": (lambda: hooked(with_norm(nn.Conv2d(3, 4, 3)), 0), X, "A"),
    "observing hooks": (observed, X, "A"),
    "unused": (steps(lambda m, x: m.conv(x)), X, "A"),
    # Linear layers: (N, C) only, which an example shows
    "linear": (lambda: with_norm(nn.Linear(8, 6, bias=False), nn.BatchNorm1d), X[:, 0, 0], "A/I"),
    "linear, (N, L, C) with L = C": (lambda: with_norm(nn.Linear(8, 3), nn.BatchNorm1d), X[:, :, 0], "A"),
    "linear, (N, L, C) with another L": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(3)), X[..., 0], "A"),
    "linear, images": (lambda: with_norm(nn.Linear(8, 3)), X, "A"),
    "linear, sync": (lambda: with_norm(nn.Linear(8, 3), nn.SyncBatchNorm), X[:, :, 0], "A"),
    # Other uses of the layer's output, parameters or memory
    "used twice": (variant(used_twice), X, "AI"),
    "used in place": (variant(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x).add_(x))))), X, "AI"),
    "used in training": (variant(lambda m, x: used_twice(m, x, 1 if m.training else None)), X, "AI"),
    "used without an option": (variant(used_twice_by_default), X, "AI"),
    "returned": (steps(lambda m, x: (m.bn(y := m.conv(x)), y)), X, "A"),
    "viewed": (steps(lambda m, x: m.bn(m.conv(x)[:]) + m.conv(x)), X, "A"),
    "kept": (steps(kept), X, "A"),
    "weight used": (variant(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)))) + m.conv1.weight.mean()), X, "AI"),
    "shared convolution": (variant(lambda m, x: m.bn2(m.conv2(m.conv1(m.bn1(m.conv1(x)))))), X, "AI"),
    "shared weight": (shared_weight, X, "AA"),
    "shared memory": (two_weights_in_one_memory, X, "A"),
    "shared memory, a view": (a_view_of_a_weight, X, "A"),
    "one memory, not shared": (one_memory_for_all, X, "IIA/III"),
    "shared norm": (variant(lambda m, x: m.bn1(m.conv1(x)) + m.bn1(m.conv2(x))), X, "AA"),
    "called twice": (variant(lambda m, x: m.bn1(m.conv1(m.bn1(m.conv1(x))))), X, "IA"),
    "forwards called": (steps(lambda m, x: m.bn.forward(m.conv.forward(x))), X, "I"),
    "in a list": (in_a(list), X, "I"),
    "in a tuple": (in_a(tuple), X, "I"),
    "in a dict": (in_a_dict, X, "I"),
    "in a closure": (in_a_closure, X, "I"),
    "weight clamped": (steps(clamped), X, "A"),
    "used in the next forward": (steps(of_previous), X, "A"),
    "used by a tied decoder": (tied, X, "A"),
    "used through a replaced forward": (through_a_replaced_forward, X, "A"),
    "used if it is a tensor": (steps(lambda m, x: plus_skip(m, h := m.conv(x), isinstance(h, torch.Tensor))), X, "A"),
    "used for a class": (steps(lambda m, x: plus_skip(m, m.conv(x), type(m.conv) is nn.Conv2d)), X, "A"),
    "used with an option": (Flag, X, "A"),
    "used without a keyword": (Keywords, X, "A"),
    "shape read": (steps(lambda m, x: m.bn(h := m.conv(x)).reshape(h.shape)), X, "I"),
    "identity between": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4)), X, "I"),
    "differentiated": (steps(forces), X, "I/A"),
    "a graph left in an attribute": (with_a_graph_left, X, "I"),
    "a constant that changes": (steps(lambda m, x: m.bn(m.conv(x)) + 1e-15 * next(COUNT)), X, "A/I"),
    "a constant that is NaN": (steps(lambda m, x: m.bn(m.conv(x)).where(x == x, torch.tensor(float("nan")))), X, "I"),
    "mode read in a closure": (in_a_closure_with_modes, X, "A"),
    "type of a norm asked for": (steps(lambda m, x: plus_skip(m, m.conv(x), type(m.bn) is not nn.Sequential)), X, "A"),
    "type of a norm": (steps(of_type), X, "A"),
    "vcl inside": (with_vcl, X, "II"),
    "checkpointed": (lambda: Model(checkpointed, block=Residual()), X, "II"),
    # Forwards that cannot be traced
    "dynamic": (lambda: Dynamic(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), X, "AAA/IAI"),
    "dynamic, repeated": (repeated, X, "AAA/AAI"),
    "dynamic, shared block": (shared_block, X, "AA/II"),
    "dynamic, something between": (between, X, "AA/AI"),
    "dynamic, intermediate results": (lambda: Model(intermediate_results, enc=encoder()), X, "A"),
    "dynamic, other use in training": (dynamic(lambda m, x: m.bn(y := m.conv(x)) + m.training * y), X, "A"),
    "dynamic, used in place": (dynamic(lambda m, x: m.bn(m.conv(x).relu_())), X, "A"),
    "dynamic, kept": (dynamic(kept), X, "A"),
    "dynamic, returned": (dynamic(lambda m, x: (m.bn(y := m.conv(x)), y)), X, "A"),
    "dynamic, weight used": (dynamic(lambda m, x: m.bn(m.conv(x)) + m.conv.weight.mean()), X, "A"),
    "dynamic, an empty tensor": (dynamic(lambda m, x: m.bn(m.conv(x)) + x.new_zeros(0).sum()), X, "A/I"),
    "dynamic, class asked for": (
        dynamic(lambda m, x: m.bn(m.conv(x)) if isinstance(m.conv, nn.Conv2d) else x),
        X,
        "A/I",
    ),
}


def randomised(net):
    """Running statistics and weights as after a training that went far."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, BATCH_NORMS):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.1, 4, generator=generator)
                if module.affine:
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(generator=generator)
    return net

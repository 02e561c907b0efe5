"""remove_batch_norm: the function stays, the batch goes; what is folded, what becomes affine, what is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vcl_kernels as vk
from vcl_kernels.nn.batch_norm import BATCH_NORMS, ChannelAffine

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
    """Its forward depends on values; ``seq`` is run in order, ``conv`` and ``bn`` only as it happens."""

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


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True))


class Checked(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        assert input.dim() == 4


GROUPS = torch.cat((X, -2 * X), 1)
VOLUMES = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
spectral_norm = nn.utils.parametrizations.spectral_norm

# name: network, its input, and what becomes of each batch norm ("I": folded, "A": affine), in the network's order
CASES = {
    "cnn": (cnn, X, "III"),
    "residual": (Residual, X, "II"),
    "pre-activation": (pre_activation, X, "AI"),
    "in a block": (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), Residual()), X, "III"),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)), X, "A"),
    "twice": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), X, "IA"),
    "linear": (lambda: with_norm(nn.Linear(8, 6, bias=False), nn.BatchNorm1d), X[:, 0, 0], "I"),
    "linear, other axis": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(3)), X[..., 0], "A"),
    "linear, other axis 2d": (lambda: with_norm(nn.Linear(8, 3)), X, "A"),
    "conv1d": (lambda: with_norm(nn.Conv1d(3, 6, 3), nn.BatchNorm1d), X[..., 0], "I"),
    "conv3d": (lambda: with_norm(nn.Conv3d(3, 6, 3), nn.BatchNorm3d), VOLUMES, "I"),
    "3-D affine": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm3d(3)), VOLUMES, "A"),
    "depthwise": (lambda: with_norm(nn.Conv2d(3, 6, 3, groups=3)), X, "I"),
    "transposed": (lambda: with_norm(nn.ConvTranspose2d(3, 4, 3)), X, "I"),
    "transposed 1d": (lambda: with_norm(nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d), X[..., 0], "I"),
    "transposed, groups": (lambda: with_norm(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)), GROUPS, "I"),
    "channels_last": (lambda: cnn().to(memory_format=torch.channels_last), X, "III"),
    "sync": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(cnn()), X, "III"),
    "norm subclass": (lambda: with_norm(nn.Conv2d(3, 4, 3), Checked), X, "I"),
    "affine=False": (lambda: with_norm(nn.Linear(8, 6), nn.BatchNorm1d, affine=False), X[:, 0, 0], "I"),
    "affine=False, affine": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False)), X, "A"),
    "used twice": (variant(used_twice), X, "AI"),
    "used in place": (variant(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x).add_(x))))), X, "AI"),
    "used in training": (variant(lambda m, x: used_twice(m, x, 1 if m.training else None)), X, "AI"),
    "used without an option": (variant(used_twice_by_default), X, "AI"),
    "weight used": (variant(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)))) + m.conv1.weight.mean()), X, "AI"),
    "shared convolution": (variant(lambda m, x: m.bn2(m.conv2(m.conv1(m.bn1(m.conv1(x)))))), X, "AI"),
    "shared weight": (shared_weight, X, "AA"),
    "shared norm": (variant(lambda m, x: m.bn1(m.conv1(x)) + m.bn1(m.conv2(x))), X, "AA"),
    "called twice": (variant(lambda m, x: m.bn1(m.conv1(m.bn1(m.conv1(x))))), X, "IA"),
    "dynamic": (lambda: Dynamic(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), X, "IAA"),
    "dynamic, repeated": (repeated, X, "AAA"),
    "dynamic, shared block": (shared_block, X, "IA"),
    "dynamic, something between": (between, X, "AA"),
    "hooks": (lambda: hooked(with_norm(nn.Conv2d(3, 4, 3)), 0), X, "A"),
    "spectral_norm": (lambda: with_norm(spectral_norm(nn.Conv2d(3, 4, 3))), X, "A"),
    "weight_norm": (old_weight_norm, X, "A"),
    "own subclass": (lambda: with_norm(Standardised(3, 4, 3)), X, "A"),
    "vcl inside": (with_vcl, X, "II"),
    "statistics by hand": (with_given_statistics, X, "IA"),
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


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays(case):
    make, x, places = CASES[case]
    net, x = randomised(make()).double().eval(), x.double()
    names = [name for name, module in net.named_modules() if isinstance(module, BATCH_NORMS)]
    before = net(x)
    assert vk.remove_batch_norm(net) is net
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    kinds = [type(net.get_submodule(name)) for name in names]
    assert kinds == [{"I": nn.Identity, "A": ChannelAffine}[place] for place in places]


def test_training_does_not_depend_on_the_batch():
    net = vk.remove_batch_norm(randomised(nn.Sequential(cnn(), nn.BatchNorm1d(10)).double())).train()
    together = net(X.double())
    one_by_one = torch.cat([net(x[None]) for x in X.double()])
    torch.testing.assert_close(one_by_one, together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net.eval()(X.double()), together, rtol=0, atol=0)


def test_names_and_parameters_stay():
    net = randomised(Residual()).train()
    net.bn1.eval()
    before, kept = dict(net.named_parameters()), list(net.state_dict())
    vk.remove_batch_norm(net)
    after = dict(net.named_parameters())
    assert list(after) == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    assert all(after[name] is before[name] for name in after if name in before)
    assert [name for name in net.state_dict() if "bn" not in name and name in kept] == ["conv1.weight", "conv2.weight"]
    assert (net.training, net.bn1.training, net.bn2.training) == (True, False, True)
    other = vk.remove_batch_norm(Residual())
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_memory_format_stay(dtype):
    net = vk.remove_batch_norm(pre_activation().to(dtype))
    assert {tensor.dtype for tensor in net.state_dict().values()} == {dtype}
    assert net(X.to(dtype)).dtype == dtype
    y = ChannelAffine(3)(X.to(dtype, memory_format=torch.channels_last))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_what_was_not_learned_is_not_learned():
    partly, layers_frozen = Residual(), Residual()
    affine = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    partly.bn1.requires_grad_(False)
    partly.bn2.bias.requires_grad_(False)
    affine[0].weight.requires_grad_(False)
    layers_frozen.requires_grad_(False).bn1.requires_grad_(True)
    learned = ["conv1.weight", "conv2.weight"], ["0.bias"], ["bn1.weight", "bn1.bias"]
    for net, names in zip((partly, affine, layers_frozen), learned, strict=True):
        before = randomised(net).eval()(X)
        vk.remove_batch_norm(net)
        torch.testing.assert_close(net(X), before, rtol=1e-5, atol=1e-5)
        assert [name for name, p in net.named_parameters() if p.requires_grad] == names
    assert isinstance(layers_frozen.bn2, nn.Identity)


def test_tracing_leaves_no_mark():
    class Counts(Residual):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.last = self.conv1(x)
            return self.bn1(self.last.relu())

    net = vk.remove_batch_norm(Counts())
    assert net.calls == 0
    assert not hasattr(net, "last")


def test_a_compiled_model_compiles_itself_again():
    net = randomised(cnn()).eval()
    compiled = torch.compile(net, backend="eager")
    before = compiled(X)
    vk.remove_batch_norm(net)
    torch.testing.assert_close(compiled(X), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.train()(X), before, rtol=1e-5, atol=1e-5)


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "model .Sequential. has no batch norm"),
        (lambda: nn.BatchNorm2d(3), "model is itself a BatchNorm2d"),
        (without_statistics, "BatchNorm2d, '2', without running statistics .*zeros and ones"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()), "LazyBatchNorm2d, '1', that has not seen"),
        (lambda: nn.Sequential(nn.Linear(3, 4), NormAct(4)), "NormAct, '1', with hooks or a forward of its own"),
        (lambda: hooked(cnn(), 5), "BatchNorm2d, '5', with hooks or a forward of its own"),
    ],
)
def test_refused_and_unchanged(make, message):
    net = make()
    modules, state = list(net.modules()), {k: v for k, v in net.state_dict().items() if not nn.parameter.is_lazy(v)}
    state = copy.deepcopy(state)
    with pytest.raises(ValueError, match=message):
        vk.remove_batch_norm(net)
    assert list(net.modules()) == modules
    for name, value in state.items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)


def test_copies_and_attach():
    net = vk.remove_batch_norm(randomised(nn.Sequential(nn.BatchNorm2d(3), *with_norm(nn.Conv2d(3, 4, 3)))))
    x = torch.randn(20, 3, 8, 8)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    handle = vk.attach(net, x[:1], layers=["1"])
    (net(x).square().mean() + handle.loss()).backward()
    assert handle.loss() > 0
    assert all(p.grad.isfinite().all() for p in net.parameters())

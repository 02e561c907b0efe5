"""remove_batch_norm: the function stays, the batch goes; what is folded, what becomes affine, what is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import vcl_kernels as vk
from vcl_kernels.nn.batch_norm import ChannelAffine

CNN = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(3, 8, 3, padding=1, bias=False),
    nn.BatchNorm2d(8, eps=1e-3),
    nn.ReLU(inplace=True),
    nn.MaxPool2d(2),
    nn.Conv2d(8, 6, 3),
    nn.BatchNorm2d(6),
    nn.ReLU(inplace=True),
    nn.Flatten(),
    nn.Linear(24, 10),
    nn.BatchNorm1d(10),
)
X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + x)


class PreActivation(Residual):
    def forward(self, x):
        h = self.conv1(self.relu(self.bn1(x)))
        return x + self.conv2(self.relu(self.bn2(h)))


class UsedTwice(Residual):
    """The first convolution's output goes past its batch norm too."""

    def forward(self, x):
        h = self.conv1(x)
        return self.bn2(self.conv2(self.bn1(h).relu())) + h


class UsedInPlace(Residual):
    def forward(self, x):
        h = self.conv1(x)
        h += x
        return self.bn2(self.conv2(self.bn1(h)))


class UsedInTraining(Residual):
    def forward(self, x):
        h = self.conv1(x)
        y = self.bn2(self.conv2(self.bn1(h)))
        return y + h if self.training else y


class UsedWithoutAnOption(Residual):
    def forward(self, x, skip=None):
        h = self.conv1(x)
        return self.bn2(self.conv2(self.bn1(h))) + (h if skip is None else skip)


class WeightUsed(Residual):
    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.conv1.weight.mean()


class SharedConv(Residual):
    def forward(self, x):
        return self.bn2(self.conv2(self.conv1(self.bn1(self.conv1(x)))))


class SharedWeight(Residual):
    def __init__(self):
        super().__init__()
        self.conv2.weight = self.conv1.weight

    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.conv2(self.bn2(x))


class SharedNorm(Residual):
    """One batch norm after two layers: no layer can have it alone."""

    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.bn1(self.conv2(x))


class CalledTwice(Residual):
    """A convolution and its batch norm, always together."""

    def forward(self, x):
        return self.bn1(self.conv1(self.bn1(self.conv1(x))))


class WithVCL(Residual):
    """What VCL does in training depends on the batch, and does not matter here."""

    def __init__(self):
        super().__init__()
        self.vcl = vk.VCL(3)

    def forward(self, x):
        return self.bn2(self.conv2(self.vcl(self.bn1(self.conv1(x))).relu()))


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


def between():
    relu = nn.ReLU()
    return Dynamic(relu, nn.Conv2d(3, 3, 3), relu, nn.BatchNorm2d(3))


def hooked():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[0].register_forward_hook(double)
    return net


def double(module, args, output):
    return 2 * output


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


def old_weight_norm():
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    return nn.Sequential(conv, nn.BatchNorm2d(4))


def own_subclass():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True))

    return nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4))


def norm_subclass():
    class Checked(nn.BatchNorm2d):
        def _check_input_dim(self, input):
            assert input.dim() == 4

    return nn.Sequential(nn.Conv2d(3, 4, 3), Checked(4))


# name: network, its input, and what becomes of each batch norm ("I": folded, "A": affine), in the network's order
CASES = {
    "cnn": (CNN, X, "III"),
    "residual": (Residual, X, "II"),
    "pre-activation": (PreActivation, X, "AI"),
    "in a block": (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), Residual()), X, "III"),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)), X, "A"),
    "twice": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), X, "IA"),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ELU()), X[:, 0, 0], "I"),
    "linear, other axis": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(3)), X[..., 0], "A"),
    "linear, other axis 2d": (lambda: nn.Sequential(nn.Linear(8, 3), nn.BatchNorm2d(3)), X, "A"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), X[..., 0], "I"),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6)), torch.randn(2, 3, 4, 4, 4), "I"),
    "3-D affine": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm3d(3)), torch.randn(2, 3, 4, 4, 4), "A"),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), X, "I"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), X, "I"),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4)), X[..., 0], "I"),
    "transposed, groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)),
        torch.cat((X, -2 * X), 1),
        "I",
    ),
    "channels_last": (lambda: CNN().to(memory_format=torch.channels_last), X, "III"),
    "sync": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(CNN()), X, "III"),
    "norm subclass": (norm_subclass, X, "I"),
    "affine=False": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False)), X[:, 0, 0], "I"),
    "affine=False, affine": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False)), X, "A"),
    "used twice": (UsedTwice, X, "AI"),
    "used in place": (UsedInPlace, X, "AI"),
    "used in training": (UsedInTraining, X, "AI"),
    "used without an option": (UsedWithoutAnOption, X, "AI"),
    "weight used": (WeightUsed, X, "AI"),
    "shared convolution": (SharedConv, X, "AI"),
    "shared weight": (SharedWeight, X, "AA"),
    "shared norm": (SharedNorm, X, "AA"),
    "called twice": (CalledTwice, X, "IA"),
    "dynamic": (lambda: Dynamic(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), X, "IAA"),
    "dynamic, repeated": (repeated, X, "AAA"),
    "dynamic, something between": (between, X, "AA"),
    "hooks": (hooked, X, "A"),
    "spectral_norm": (spectral, X, "A"),
    "weight_norm": (old_weight_norm, X, "A"),
    "own subclass": (own_subclass, X, "A"),
    "vcl inside": (WithVCL, X, "II"),
}


def randomised(net):
    """Running statistics and weights as after a training that went far."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.1, 4, generator=generator)
                if module.affine:
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(generator=generator)
    return net


def norms_of(net):
    return [name for name, module in net.named_modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_the_function_stays(case, dtype):
    make, x, places = CASES[case]
    torch.manual_seed(0)
    net = randomised(make()).to(dtype).eval()
    names, x, tolerance = norms_of(net), x.to(dtype), 1e-5 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        before = net(x)
        assert vk.remove_batch_norm(net) is net
        torch.testing.assert_close(net(x), before, rtol=tolerance, atol=tolerance)
    kinds = [type(net.get_submodule(name)) for name in names]
    assert kinds == [{"I": nn.Identity, "A": ChannelAffine}[place] for place in places]


def test_training_does_not_depend_on_the_batch():
    net = nn.Sequential(CNN(), nn.Unflatten(1, (10, 1)), nn.BatchNorm1d(10)).double()
    vk.remove_batch_norm(randomised(net)).train()
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
def test_dtype_stays(dtype):
    net = vk.remove_batch_norm(UsedTwice().to(dtype))
    assert {tensor.dtype for tensor in net.state_dict().values()} == {dtype}
    assert net(X.to(dtype)).dtype == dtype


def test_affine_keeps_dtype_and_memory_format_of_its_input():
    affine = ChannelAffine(3)
    y = affine(X.bfloat16().to(memory_format=torch.channels_last))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_what_was_not_learned_is_not_learned():
    net = Residual()
    net.bn1.requires_grad_(False)
    net.bn2.bias.requires_grad_(False)
    vk.remove_batch_norm(net)
    assert not net.conv1.bias.requires_grad
    assert net.conv1.weight.requires_grad
    assert not net.conv2.bias.requires_grad

    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False))
    net[0].weight.requires_grad_(False)
    vk.remove_batch_norm(net)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.bias"]


def test_frozen_layer_leaves_the_norm_its_learning():
    net = randomised(Residual()).eval()
    net.conv1.requires_grad_(False)
    net.conv2.requires_grad_(False)
    net.bn2.requires_grad_(False)
    before = net(X)
    vk.remove_batch_norm(net)
    torch.testing.assert_close(net(X), before, rtol=1e-5, atol=1e-5)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["bn1.weight", "bn1.bias"]
    assert isinstance(net.bn2, nn.Identity)


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
    net = randomised(CNN()).eval()
    compiled = torch.compile(net, backend="eager")
    before = compiled(X)
    vk.remove_batch_norm(net)
    torch.testing.assert_close(compiled(X), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.train()(X), before, rtol=1e-5, atol=1e-5)


def test_distributed_is_refused():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="DistributedDataParallel.*wrap it afterwards"):
            vk.remove_batch_norm(nn.parallel.DistributedDataParallel(CNN()))
    finally:
        distributed.destroy_process_group()


def test_copy_and_pickle():
    net = vk.remove_batch_norm(randomised(UsedTwice()))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)


def without_statistics():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))


def norm_with_an_activation():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), NormAct(4))


def norm_with_a_hook():
    net = CNN()
    net[5].register_forward_hook(double)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "model .Sequential. has no batch norm"),
        (lambda: nn.BatchNorm2d(3), "model is itself a BatchNorm2d"),
        (without_statistics, "BatchNorm2d, '2', without running statistics .*zeros and ones"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()), "LazyBatchNorm2d, '1', that has not seen"),
        (norm_with_an_activation, "NormAct, '2', with hooks or a forward of its own"),
        (norm_with_a_hook, "BatchNorm2d, '5', with hooks or a forward of its own"),
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


def test_statistics_given_by_hand():
    net = without_statistics()
    net[2].running_mean, net[2].running_var = torch.zeros(4), torch.ones(4)
    before = net.eval()(X)
    torch.testing.assert_close(vk.remove_batch_norm(net)(X), before, rtol=1e-5, atol=1e-5)


def test_with_attach():
    net = vk.remove_batch_norm(randomised(CNN())).train()
    example = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    before = net(example)
    handle = vk.attach(net, example[:1])
    torch.testing.assert_close(net(example), before)
    optimizer = torch.optim.SGD(vk.param_groups(net, 1e-4), lr=1e-3)
    loss = net(example).square().mean() + handle.loss()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert handle.loss() > 0
    assert all(p.grad.isfinite().all() for p in net.parameters())

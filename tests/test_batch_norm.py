"""remove_batch_norm: the function stays, the batch goes; what is folded, what becomes affine, and the report."""

import copy
import gc
import itertools
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import Model
from normed import (
    CASES,
    Dynamic,
    NormAct,
    Residual,
    X,
    cnn,
    dynamic,
    parts,
    pre_activation,
    randomised,
    steps,
    with_norm,
)
from torch import nn

import vcl_kernels as vk
from vcl_kernels.nn import batch_norm
from vcl_kernels.nn import parts as rooms
from vcl_kernels.nn.affine import ChannelAffine
from vcl_kernels.nn.norms import BATCH_NORMS

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDE = Path(__file__).parent.parent / "docs/batch_norm.md"


@pytest.mark.parametrize("shown", [False, True], ids=["traced", "shown"])
@pytest.mark.parametrize("case", CASES)
def test_the_function_stays(case, shown):
    make, x, places = CASES[case]
    traced, _, with_example = places.partition("/")
    wanted = with_example or traced if shown else traced
    net, x = randomised(make()).double().eval(), x.double()
    names = [name for name, module in net.named_modules() if isinstance(module, BATCH_NORMS)]
    objects = list(net.modules())
    net(x)  # a forward may leave something for the next
    before = net(x)
    removal = vk.remove_batch_norm(net, x if shown else None)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    places = ["A" if isinstance(net.get_submodule(name), ChannelAffine) else "I" for name in names]
    assert "".join(places) == wanted, removal
    assert list(net.modules()) == objects
    assert not any(isinstance(module, BATCH_NORMS) for module in objects)
    assert ["A" if row.folded_into is None else "I" for row in removal.rows] == places
    assert [bool(row.reason) for row in removal.rows] == [place == "A" for place in places]


def test_training_does_not_depend_on_the_batch():
    net = vk.remove_batch_norm(randomised(nn.Sequential(cnn(), nn.BatchNorm1d(10)).double())).model.train()
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
    other = vk.remove_batch_norm(Residual()).model
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_memory_format_stay(dtype):
    net = vk.remove_batch_norm(pre_activation().to(dtype)).model
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


def test_following_a_forward_leaves_no_mark():
    class Counts(Residual):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.last = self.conv1(x)
            return self.bn1(F.dropout(self.last, training=self.training))

    for example in (None, X):
        net, x, state = Counts(), X.clone(), torch.get_rng_state()
        vk.remove_batch_norm(net, None if example is None else x)
        assert net.calls == 0
        assert not hasattr(net, "last")
        assert torch.equal(x, X)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("given", ["inside", "compiled"])
def test_a_compiled_model_compiles_itself_again(given):
    net = randomised(cnn()).eval()
    compiled = torch.compile(net, backend="eager")
    before = compiled(X)
    removal = vk.remove_batch_norm(net if given == "inside" else compiled, X)
    assert removal.model is net
    assert all(row.folded_into for row in removal.rows)
    torch.testing.assert_close(compiled(X), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.train()(X), before, rtol=1e-5, atol=1e-5)


def test_the_report_tells_what_became_of_each():
    net = nn.Sequential(Residual(), nn.BatchNorm2d(3), nn.Flatten(), *with_norm(nn.Linear(192, 4), nn.BatchNorm1d))
    removal = vk.remove_batch_norm(net)
    assert repr(removal).splitlines() == [
        "batch norm  type         became             because",
        "0.bn1       BatchNorm2d  part of '0.conv1'",
        "0.bn2       BatchNorm2d  part of '0.conv2'",
        "1           BatchNorm2d  ChannelAffine      its input is not the output of a convolution or linear layer",
        "4           BatchNorm1d  ChannelAffine      "
        "Linear '3' has an output of unknown shape; an example_input shows it",
        "4 batch norms removed: 2 folded, 2 affine",
    ]
    unknown = vk.remove_batch_norm(Dynamic())
    assert [row.reason for row in unknown.rows] == ["the forward could not be followed; an example_input may show it"]
    assert repr(unknown).splitlines()[-1].startswith("The forward cannot be traced: TraceError: symbolically")


def test_a_forward_that_fails_in_training_proves_nothing_in_evaluation():
    def forward(m, x):
        return m.bn(m.conv(x if not m.training else x["images"]))

    traced, dynamic_one = steps(forward)(), dynamic(forward)()
    removal = vk.remove_batch_norm(traced, X)
    assert removal.rows[0].folded_into == "conv"
    (note,) = removal.notes
    assert note.startswith("The forward cannot be followed on example_input, in both modes: IndexError")
    removal = vk.remove_batch_norm(dynamic_one, X)
    assert removal.rows[0].reason == "the forward could not be followed"
    assert [note.split(": ")[0] for note in removal.notes] == [
        "The forward cannot be traced",
        "The forward cannot be followed on example_input, in both modes",
    ]


# What keeps a batch norm from being folded, and how it is said: by a trace, or on an example
REASONS = {
    ("first", "traced"): "its input is not the output of a convolution or linear layer",
    ("weight_norm", "shown"): "ParametrizedConv2d '0' is parametrized",
    ("own subclass", "shown"): "Standardised '0' is a Standardised, which may compute its weight in each forward",
    ("observing hooks", "shown"): "Conv2d '0' has hooks or a forward of its own",
    ("linear, images", "shown"): "Linear '0' has another output than (N, C)",
    ("linear, (N, L, C) with L = C", "shown"): "Linear '0' has another output than (N, C)",
    ("linear", "traced"): "Linear '0' has an output of unknown shape; an example_input shows it",
    ("returned", "shown"): "the output of Conv2d 'conv' has other uses",
    ("dynamic, weight used", "shown"): "a forward reads the parameters of Conv2d 'conv'",
    ("shared memory", "traced"): "Conv2d 'conv' shares memory with another module",
    ("shared norm", "shown"): "its inputs come from several layers",
    ("unused", "shown"): "no forward that was followed calls it",
}


@pytest.mark.parametrize(("case", "shown"), REASONS)
def test_reasons(case, shown):
    make, x, _ = CASES[case]
    net = make()
    removal = vk.remove_batch_norm(net, x.to(next(net.parameters()).dtype) if shown == "shown" else None)
    assert removal.rows[0].reason == REASONS[case, shown]


def test_the_guide_has_each_reason():
    guide = GUIDE.read_text()
    reasons, refusals = (guide.split(title)[1].split("\n## ")[0] for title in ("not folded\n", "is refused\n"))
    phrases = phrases_of(reasons)
    texts = [*REASONS.values(), *OF_LAYERS, "the forward could not be followed"]
    assert [text for text in texts if not any(phrase in text for phrase in phrases)] == []
    assert [phrase for phrase in phrases if not any(phrase in text for text in texts)] == []
    code = "".join(path.read_text() for path in Path(batch_norm.__file__).parent.glob("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # texts over several lines
    assert [phrase for phrase in phrases_of(refusals) if phrase not in code] == []
    assert len(phrases_of(refusals)) > 10


def phrases_of(table):
    rows = re.findall(r"^\| (\*.*?\*) \|", table, re.MULTILINE)
    return [phrase for row in rows for phrase in row.strip("*").split("*, *")]


OF_LAYERS = (
    "has no shape yet",
    "is frozen, and the batch norm learns",
    "is on meta, not cpu",
    "has 4 channels, not 5",
    "has a Tensor for a parameter",
)


def test_layers_that_keep_a_batch_norm_out():
    lazy_layer = with_norm(nn.Conv2d(3, 4, 3))
    lazy_layer[0] = nn.LazyConv2d(4, 3)
    frozen = with_norm(nn.Conv2d(3, 4, 3))
    frozen[0].requires_grad_(False)
    elsewhere = with_norm(nn.Conv2d(3, 4, 3, device="meta"))
    other_channels = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))
    plain = with_norm(nn.Conv2d(3, 4, 3))
    weight = plain[0].weight.detach()
    del plain[0].weight
    plain[0].weight = weight
    for net, reason in zip((lazy_layer, frozen, elsewhere, other_channels, plain), OF_LAYERS, strict=True):
        (row,) = vk.remove_batch_norm(net).rows
        assert row.reason.endswith(reason)


def test_other_models_keep_their_values():
    net, other = with_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(3, 4, 3)
    other.weight.data, before = net[0].weight.data, net[0].weight.detach().clone()
    assert vk.remove_batch_norm(randomised(net)).rows[0].folded_into == "0"
    assert torch.equal(other.weight, before)
    assert not torch.equal(net[0].weight, before)


def test_meta():
    net = with_norm(nn.Conv2d(3, 4, 3)).to("meta")
    assert vk.remove_batch_norm(net).rows[0].folded_into == "0"
    net = with_norm(nn.Conv2d(3, 4, 3)).to("meta")
    vk.remove_batch_norm(net, X.to("meta"))
    assert net(X.to("meta")).shape == (5, 4, 6, 6)


def test_copies_and_attach():
    net = randomised(nn.Sequential(nn.BatchNorm2d(3), *with_norm(nn.Conv2d(3, 4, 3)), NormAct(4)))
    vk.remove_batch_norm(net)
    x = torch.randn(20, 3, 8, 8)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
    handle = vk.attach(net, x[:1], layers=["1"])
    (net(x).square().mean() + handle.loss()).backward()
    assert handle.loss() > 0
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_random_numbers_stay():
    numpy = pytest.importorskip("numpy")

    def forward(m, x):
        return m.bn(m.conv(x)) + random.random() + numpy.random.rand() + torch.rand(())

    def states():
        return random.getstate(), numpy.random.get_state()[2], torch.get_rng_state().tolist()

    for example in (None, X):
        net = steps(forward)()
        before = states()
        vk.remove_batch_norm(net, example)
        assert states() == before


def test_inside_of_autocast_the_new_weights_act():
    net = randomised(with_norm(nn.Conv2d(3, 4, 3)))
    before = net.eval()(X)
    with torch.autocast("cpu", torch.bfloat16):
        net(X)  # autocast keeps the weights that it has cast
        vk.remove_batch_norm(net, X)
        torch.testing.assert_close(net(X).float(), before, rtol=0.05, atol=0.1)


def test_inside_of_inference_mode():
    net = with_norm(nn.Conv2d(3, 4, 3))
    net.append(nn.BatchNorm2d(4))
    with torch.inference_mode():
        vk.remove_batch_norm(net, X)
    net(X).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_gradients_of_old_values_are_dropped():
    net = with_norm(nn.Conv2d(3, 4, 3))
    net(X).square().sum().backward()
    vk.remove_batch_norm(net)
    assert [p.grad for p in net.parameters()] == [None, None]


def test_attributes_that_users_gave_stay():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    for norm in net[1:]:
        norm.label, norm.centres = "stem", torch.ones(3)
    vk.remove_batch_norm(net)
    assert [(norm.label, norm.centres.sum()) for norm in net[1:]] == 2 * [("stem", 3)]
    assert not hasattr(net[2], "eps")


def test_parameters_that_a_forward_changes_stay():
    class Quantiser(Residual):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x):
            y = self.bn1(self.conv1(x))
            self.codes.data.mul_(0.5)
            return y * self.codes.view(1, -1, 1, 1)

    for example in (None, X):
        net = Quantiser()
        vk.remove_batch_norm(net, example)
        assert net.codes.tolist() == [1, 1, 1]


def test_what_is_not_removed_or_compared_is_noted():
    net = Model(lambda m, x: SimpleNamespace(size=len(m.bn(m.conv(x)))), **parts())
    net.teacher = [with_norm(nn.Conv2d(3, 4, 3))]
    alone, *notes = vk.remove_batch_norm(net, X).notes
    assert alone.startswith("Seen on the example alone; branches that it does not take were not checked (RuntimeError")
    assert notes == [
        "Outputs were not compared: the output on example_input holds no tensors",
        "Batch norms in teacher stay: they are not among the model's modules",
    ]
    assert isinstance(net.teacher[0][1], nn.BatchNorm2d)


def test_affine_maps_round_once():
    """As batch norm does: it computes in float32 beside bfloat16."""
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.fill_(100.3)
    x = (100.3 + torch.randn(50, 3, 8, 8)).bfloat16()
    exact, of_norm = norm.double()(x.double()), norm.float()(x)
    vk.remove_batch_norm(norm)
    assert norm(x).dtype == torch.bfloat16
    shift, of_norm = ((y.double() - exact).mean().abs() for y in (norm(x), of_norm))
    assert shift <= 2 * of_norm + 1e-4


@pytest.mark.usefixtures("one_process")
def test_a_wrapper_outside_is_seen():
    net = with_norm(nn.Conv2d(3, 4, 3))
    wrapper = nn.parallel.DistributedDataParallel(net)
    for model in (net, wrapper):
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            vk.remove_batch_norm(model)
    assert isinstance(net[1], nn.BatchNorm2d)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    net = cnn()
    classes, change_class, calls = [type(m) for m in net.modules()], rooms.change_class, itertools.count()

    def interrupted(*args, **attributes):
        if next(calls) == 3:
            raise KeyboardInterrupt
        change_class(*args, **attributes)

    monkeypatch.setattr(rooms, "change_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vk.remove_batch_norm(net, X)
    assert [type(m) for m in net.modules()] == classes
    assert all(m.training for m in net.modules())


def test_copies_are_let_go():
    net = Residual()
    gc.collect()
    gc.disable()
    try:
        vk.remove_batch_norm(net, X)
        assert sum(type(found) is Residual for found in gc.get_objects()) == 1
    finally:
        gc.enable()


class OnlyItself(nn.BatchNorm2d):
    """Allows no subclass."""

    def __init_subclass__(cls):
        raise TypeError("final")


def test_norms_that_cannot_be_followed_become_affine():
    net = randomised(with_norm(nn.Conv2d(3, 4, 3), OnlyItself)).eval()
    before = net(X)
    assert vk.remove_batch_norm(net, X).rows[0].reason == "the forward could not be followed"
    torch.testing.assert_close(net(X), before, rtol=1e-5, atol=1e-5)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x


def test_modules_that_a_closure_reaches_do_not_run():
    net = Model(lambda m, x: m.call(x), **parts(counter=Counter()))
    net.call = lambda x: net.counter(net.bn(net.conv(x)))
    removal = vk.remove_batch_norm(net, X)
    assert net.counter.count == 0
    assert removal.rows[0].folded_into is None
    assert "Outputs were not compared: it reaches a Counter of the model itself" in removal.notes[-1]

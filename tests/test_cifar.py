"""The CIFAR study: the authors' recipe written out, and runs that survive interruption."""

import json
import math
from unittest import mock

import pytest
import torch
from common import assert_all_close
from torch import nn
from torch.nn import functional as F

import vcl_kernels as vk
from benchmarks.accuracy.cifar import files, recipe, records, runs, training
from benchmarks.accuracy.data import Data
from benchmarks.accuracy.errors import DataError

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # the paper's 2x2 kernels
]
WIDTHS = (192, 192, 240, 240, 260, 260, 280, 280, 300, 300)
KERNELS = (5, 1, 3, 1, 2, 1, 2, 1, 2, 1)
SIZES = (32, 16, 16, 8, 8, 4, 4, 2, 2, 1)  # of what enters each ELU but the first, whose pooling comes after it


def of_type(model, *types):
    return [module for module in model.modules() if isinstance(module, types)]


def test_the_network_is_the_authors():
    model = recipe.network("none", 10, 1)
    convolutions = of_type(model, nn.Conv2d)
    found = [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions]
    assert found == [(i, o, (k, k)) for i, o, k in zip((3, *WIDTHS), (*WIDTHS, 10), (*KERNELS, 1), strict=True)]
    assert [c.padding for c in convolutions] == ["same"] * 10 + [(0, 0)]
    assert "".join(type(module).__name__[0] for module in model) == "CEM" + "CE" + "CEMDCE" * 4 + "DCAF"
    assert [module.p for module in of_type(model, nn.Dropout)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert {(module.kernel_size, module.stride) for module in of_type(model, nn.MaxPool2d)} == {(2, 2)}
    entered = []
    for module in of_type(model, nn.ELU):
        module.register_forward_pre_hook(lambda _, args: entered.append(tuple(args[0].shape[1:])))
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert entered == [(c, size, size) for c, size in zip(WIDTHS, SIZES, strict=True)]
    recipe.attach(model, "vcl", torch.randn(1, 3, 32, 32))
    betas = [p for name, p in model.named_parameters() if name.endswith("beta")]
    assert sum(p.numel() for p in betas) == 350_460  # as many as the citing paper counts
    assert all((beta == 1).all() for beta in betas)


@pytest.mark.parametrize(
    ("method", "activation", "norm"),
    [
        ("none", nn.ELU, None),
        ("none-relu", nn.ReLU, None),
        ("bn-relu", nn.ReLU, nn.BatchNorm2d),
        ("bn", nn.ELU, nn.BatchNorm2d),
        ("gn", nn.ELU, nn.GroupNorm),
    ],
)
def test_a_method_chooses_activation_and_norm(method, activation, norm):
    model = recipe.network(method, 10, 0.25)
    assert [type(m) for m in of_type(model, nn.ReLU, nn.ELU)] == [activation] * 10
    norms = of_type(model, nn.BatchNorm2d, nn.GroupNorm)
    assert [type(m) for m in norms] == [norm] * (10 if norm else 0)
    assert all(conv.bias is not None for conv in of_type(model, nn.Conv2d))
    if norm is nn.BatchNorm2d:
        assert {m.eps for m in norms} == {0.001}
    if norm is nn.GroupNorm:
        groups = [(m.num_groups, m.num_channels) for m in norms[::2]]
        assert groups == [(8, 48), (6, 60), (5, 65), (7, 70), (5, 75)]


@pytest.mark.parametrize(("method", "variance"), [("none", 1 / 3), ("none-he", 2)])
def test_initialisation_is_pytorchs_with_biases_0_or_hes(method, variance):
    for conv in of_type(recipe.network(method, 10, 0.5), nn.Conv2d):
        assert float(conv.weight.detach().var()) * conv.weight[0].numel() == pytest.approx(variance, rel=0.15)
        assert not conv.bias.any()


VCL_CHANGED = {"vcl-channel": ("channel", 0.01), "vcl-weight-0.1": ("activation", 0.1)}


@pytest.mark.parametrize("method", ["vcl", "vcl-channel", "vcl-weight-0.1", "vcl-he", "vcl-relu"])
def test_vcl_has_the_settings_of_its_method(method):
    model = recipe.network(method, 10, 0.02)
    weight = recipe.attach(model, method, torch.randn(1, 3, 32, 32)).weight
    found = [(m.form, m.sub_batch_size, m.num_sub_batches, m.unit, weight) for m in of_type(model, vk.VCLActivation)]
    assert found == 10 * [("ratio", 5, 2, *VCL_CHANGED.get(method, ("activation", 0.01)))]


def test_methods_of_a_seed_start_from_the_same_weights():
    networks = [new(method).learner.model for method in runs.BASE]
    for none, *others in zip(*(of_type(network, nn.Conv2d) for network in networks), strict=True):
        assert all(torch.equal(none.weight, other.weight) for other in others)


@pytest.mark.parametrize("epochs", [60, 160])
def test_the_learning_rate_drops_at_shares_of_the_run(epochs):
    steps = 200 * epochs
    found = [recipe.drop(step, steps) for step in range(steps)]
    drops = [0, *(i for i in range(1, steps) if found[i] != found[i - 1])]
    assert drops == [share * steps for share in (0, 3 / 8, 5 / 8, 7 / 8)]
    assert [0.05 * found[step] for step in drops] == pytest.approx([0.05, 0.01, 1e-3, 1e-4])


DECAY = 0.1  # large, so that what decays can be told from what does not


def by_hand(model, x, y, momentum, rate, vcl):
    """The parameters after one step of SGD with Nesterov momentum, each gradient clipped, written out."""
    loss = F.cross_entropy(model(x), y)
    loss = loss + vcl() if vcl else loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    after = {}
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        g = g / max(1.0, float(g.norm()))
        scale_of_norm = name.endswith("weight") and p.dim() == 1
        if not name.endswith("bias") and not scale_of_norm:
            g = g + DECAY * p.detach()
        velocity = momentum[name] = 0.9 * momentum.get(name, torch.zeros_like(g)) + g
        after[name] = p.detach() - rate * (g + 0.9 * velocity)
    return after


@pytest.mark.parametrize("method", runs.BASE)
def test_steps_of_the_learner_equal_steps_by_hand(monkeypatch, method):
    monkeypatch.setattr(recipe, "WEIGHT_DECAY", DECAY)
    x, y = torch.randn(12, 3, 32, 32), torch.randint(10, (12,))
    model = recipe.network(method, 10, 0.05)
    handle = recipe.attach(model, method, x[:1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(0.1)  # gradients so large that the clipping has to act, biases that could decay
    learner = recipe.ReferenceLearner(model, handle, steps=4, learning_rate=0.05, dtype=torch.float32)
    momentum, clipped = {}, False
    for step, rate in enumerate((0.05, 0.05, 0.01, 1e-3)):
        torch.manual_seed(step)  # of dropout
        expected = by_hand(model, x, y, momentum, rate, handle.loss if handle else None)
        torch.manual_seed(step)
        learner.step(x, y)
        clipped |= any(p.grad.norm() > 0.999 for p in model.parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-6)
    assert clipped


def test_crops_are_parts_of_the_image_in_a_border_of_zeros():
    x = torch.rand(200, 2, 6, 6) + 1
    drawn = recipe.draw(200, torch.Generator().manual_seed(0), CPU)
    assert drawn.order.sort().values.tolist() == list(range(200))
    assert drawn.corner.unique().tolist() == list(range(9))
    assert 70 < int(drawn.mirrored.sum()) < 130
    found = recipe.crop_and_flip(x, drawn.corner, drawn.mirrored)
    assert found.is_contiguous(memory_format=torch.channels_last)
    padded = F.pad(x, (4, 4, 4, 4))
    for i in range(200):
        row, column = drawn.corner[:, i].tolist()
        window = padded[i, :, row : row + 6, column : column + 6]
        assert torch.equal(found[i], window.flip(2) if drawn.mirrored[i] else window)


def new(method, epochs=3, dtype=torch.bfloat16, mirror_labels=False, batch=20):
    random = torch.Generator().manual_seed(7)
    x, y = torch.randn(60, 3, 32, 32, generator=random), torch.randint(10, (60,), generator=random)
    data = Data(x, y.flip(0) if mirror_labels else y, x[:20], y[:20], 10)
    run = runs.Run("0", "cifar10", method, 5, 0.05, epochs, 0.03, 10)
    with mock.patch.object(training, "BATCH", batch):
        return training.Training(run, data, dtype=dtype, device=CPU)


def comparable(record):
    """The record without what may differ between a run and the same run interrupted: times, and the interruptions."""
    times = {column: values for column, values in record["epochs"].items() if column != "cpu_seconds"}
    return {**record, "epochs": times, "resumed_after_epochs": None}


@pytest.mark.parametrize("method", runs.BASE)
def test_an_interrupted_run_equals_one_that_was_not(tmp_path, method):
    store, whole = files.Store(tmp_path / "results", tmp_path / "state"), new(method)
    for _ in range(3):
        whole.epoch()
    first = new(method)
    first.epoch()
    store.save(first)
    calls = iter([False, True])
    with pytest.raises(training.Stopped):
        first.epoch(lambda: next(calls))
    torch.manual_seed(99)  # another process, with other random numbers
    for _ in range(2):
        part = new(method)
        store.resume(part)
        part.epoch()
        store.save(part)
    assert part.finished
    assert part.record["resumed_after_epochs"] == [1, 2]
    assert comparable(part.record) == comparable(whole.record)
    assert_all_close(part.state()["model"].values(), whole.state()["model"].values(), rtol=0, atol=0)
    assert len(whole.record["layers"]) == 4


def test_a_look_at_the_layers_is_recorded_and_leaves_the_training_as_it_is(monkeypatch):
    seen, unseen = (new("vcl", epochs=2) for _ in range(2))
    monkeypatch.setattr(unseen, "look", lambda: None)
    for one in (seen, unseen):
        one.epoch()
        one.epoch()
    assert seen.record["epochs"]["train_loss"] == unseen.record["epochs"]["train_loss"]
    text = records.text(seen.record)
    assert json.loads(text)["run"] == seen.record["run"]
    assert json.loads(text)["epochs"]["test_nll"] == pytest.approx(seen.record["epochs"]["test_nll"], rel=1e-5)
    assert text.count("\n") < 30  # a line for each column
    (before, *_, after) = seen.record["layers"]
    assert (before["after_epochs"], after["after_epochs"]) == (0, 2)
    assert before["train_loss"] == pytest.approx(math.log(10), abs=0.02)
    for name in ("variance_by_channel", "constancy_by_activation", "beta", "beta_least", "gradient_share"):
        assert len(after[name]) == 10
        assert all(value > 0 for value in after[name])


def test_the_gradient_share_is_of_the_weight_before_the_activation():
    one = new("vcl", dtype=torch.float32)
    for module in of_type(one.learner.model, nn.Dropout):
        module.p = 0.0
    one.look()
    x, y = one.data.train_x[:20], one.data.train_y[:20]
    task, penalty = one.learner.losses(x, y)
    weight = of_type(one.learner.model, nn.Conv2d)[0].weight
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (task, penalty)]
    assert one.record["layers"][0]["gradient_share"][0] == pytest.approx(float(norms[1] / norms[0]), rel=1e-4)


def test_a_batch_that_is_not_whole_is_left_out(monkeypatch):
    one = new("none", batch=25)
    steps = []
    monkeypatch.setattr(one.learner, "step", lambda x, _: steps.append(len(x)) or torch.zeros(2))
    one.epoch()
    assert steps == [25, 25]


def test_a_run_that_diverges_ends(tmp_path):
    one = new("none")
    with torch.no_grad():
        one.learner.parameters[0].fill_(float("nan"))
    one.epoch()
    assert one.finished
    assert one.record["diverged"]
    store = files.Store(tmp_path, tmp_path)
    store.publish(one)
    record = store.record(one.run)
    assert record["epochs"]["train_loss"] == [None]
    assert records.score(record) == (float("inf"), float("inf"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 9}, r"cannot be resumed; delete.*'epochs': 3.*'epochs': 9"),
        ({"dtype": torch.float32}, "of machine .*bfloat16.*not .*float32"),
        ({"mirror_labels": True}, "of images .*labels_crc32"),
        (None, "cannot be resumed"),
    ],
    ids=["another run", "another machine", "other data", "a broken file"],
)
def test_a_checkpoint_of_another_run_machine_or_data_is_refused(tmp_path, changed, message):
    store, saved = files.Store(tmp_path, tmp_path), new("none")
    store.save(saved)
    if changed is None:
        (tmp_path / saved.run.name / "checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(DataError, match=rf"checkpoint.pt.*{message}"):
        store.resume(new("none", **(changed or {})))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    files.replace_whole(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        files.replace_whole(path, lambda file: file.write(b"ne") / 0)
    assert path.read_bytes() == b"old"

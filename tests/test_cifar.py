"""The CIFAR study: the authors' recipe written out, runs that survive interruption, the queue, the plan."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vcl_kernels as vk
from benchmarks.accuracy.cifar import files, recipe, records, runs, training
from benchmarks.demo.data import Data
from benchmarks.demo.errors import DataError
from benchmarks.demo.learner import parameter_groups

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # the paper's 2x2 kernels
]


def test_the_network_is_the_authors():
    model = recipe.network("none", 10, 1)
    C, E, P, D = "conv", "elu", "pool", "dropout"

    def said(module):
        if isinstance(module, nn.Conv2d):
            return C, module.in_channels, module.out_channels, module.kernel_size[0], module.padding
        if isinstance(module, nn.MaxPool2d):
            return P, module.kernel_size, module.stride
        if isinstance(module, nn.Dropout):
            return D, module.p
        return E if isinstance(module, nn.ELU) else type(module).__name__

    assert [said(module) for module in model] == [
        *((C, 3, 192, 5, "same"), E, (P, 2, 2)),
        *((C, 192, 192, 1, "same"), E),
        *((C, 192, 240, 3, "same"), E, (P, 2, 2), (D, 0.1)),
        *((C, 240, 240, 1, "same"), E),
        *((C, 240, 260, 2, "same"), E, (P, 2, 2), (D, 0.2)),
        *((C, 260, 260, 1, "same"), E),
        *((C, 260, 280, 2, "same"), E, (P, 2, 2), (D, 0.3)),
        *((C, 280, 280, 1, "same"), E),
        *((C, 280, 300, 2, "same"), E, (P, 2, 2), (D, 0.4)),
        *((C, 300, 300, 1, "same"), E, (D, 0.5)),
        (C, 300, 10, 1, (0, 0)),
        "AdaptiveAvgPool2d",
        "Flatten",
    ]
    seen = []
    for module in model:
        if isinstance(module, nn.ELU):
            module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[1:])))
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    sizes = (32, 16, 16, 8, 8, 4, 4, 2, 2, 1)
    channels = (192, 192, 240, 240, 260, 260, 280, 280, 300, 300)
    assert seen == [(c, size, size) for c, size in zip(channels, sizes, strict=True)]


def test_betas_are_as_many_as_the_citing_paper_counts():
    model = recipe.network("vcl", 10, 1)
    plain = sum(p.numel() for p in model.parameters())
    recipe.attach(model, "vcl", torch.randn(1, 3, 32, 32))
    betas = [p for name, p in model.named_parameters() if name.endswith("beta")]
    assert len(betas) == 10
    assert sum(p.numel() for p in betas) == sum(p.numel() for p in model.parameters()) - plain == 350_460
    assert all((beta == 1).all() for beta in betas)


def test_an_even_kernel_pads_one_more_right_and_below():
    model = recipe.network("none", 10, 0.02)
    (conv,) = [m for m in model if isinstance(m, nn.Conv2d) and m.kernel_size == (2, 2)][:1]
    x = torch.randn(1, conv.in_channels, 8, 8)
    padded = F.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias))


@pytest.mark.parametrize("method", ["bn", "gn"])
def test_convolutions_keep_their_bias_before_a_norm(method):
    model = recipe.network(method, 10, 0.25)
    convolutions = [module for module in model if isinstance(module, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convolutions)
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    assert len(norms) == 10
    if method == "bn":
        assert {norm.eps for norm in norms} == {0.001}
    else:
        assert [(norm.num_groups, norm.num_channels) for norm in norms[::2]] == [
            (8, 48),
            (6, 60),
            (5, 65),
            (7, 70),
            (5, 75),
        ]


@pytest.mark.parametrize(("method", "variance"), [("none", 1 / 3), ("none-he", 2)])
def test_initialisation_is_pytorchs_with_biases_0_or_hes(method, variance):
    torch.manual_seed(0)
    model = recipe.network(method, 10, 0.5)
    for conv in (module for module in model if isinstance(module, nn.Conv2d)):
        inputs = conv.weight[0].numel()
        assert float(conv.weight.detach().var()) * inputs == pytest.approx(variance, rel=0.15)
        assert not conv.bias.any()


@pytest.mark.parametrize(("method", "kind"), [("none-relu", nn.ReLU), ("bn-relu", nn.ReLU), ("none", nn.ELU)])
def test_a_method_chooses_the_activation(method, kind):
    found = [m for m in recipe.network(method, 10, 0.02) if isinstance(m, nn.ReLU | nn.ELU)]
    assert len(found) == 10
    assert all(type(m) is kind for m in found)


@pytest.mark.parametrize("method", ["vcl", "vcl-channel", "vcl-weight-0.1", "vcl-he", "vcl-relu"])
def test_vcl_has_the_settings_of_its_method(method):
    model = recipe.network(method, 10, 0.02)
    recipe.attach(model, method, torch.randn(1, 3, 32, 32))
    found = [m for m in model.modules() if isinstance(m, vk.VCLActivation)]
    assert len(found) == 10
    unit = "channel" if method == "vcl-channel" else "activation"
    weight = 0.1 if method == "vcl-weight-0.1" else 0.01
    settings = {(m.form, m.unit, m.sub_batch_size, m.num_sub_batches, m.weight) for m in found}
    assert settings == {("ratio", unit, 5, None, weight)}


def test_methods_of_a_seed_start_from_the_same_weights():
    found = []
    for method in runs.BASE:
        torch.manual_seed(3)
        found.append([m.weight for m in recipe.network(method, 10, 0.02) if isinstance(m, nn.Conv2d)])
    for weights in zip(*found, strict=True):
        assert all(torch.equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize("epochs", [60, 160])
def test_the_learning_rate_drops_at_shares_of_the_run(epochs):
    steps = 200 * epochs
    found = [recipe.drop(step, steps) for step in range(steps)]
    drops = [i / steps for i in range(1, steps) if found[i] != found[i - 1]]
    assert drops == [3 / 8, 5 / 8, 7 / 8]
    assert [0.05 * found[round(share * steps)] for share in (0, 3 / 8, 5 / 8, 7 / 8)] == pytest.approx(
        [0.05, 0.01, 1e-3, 1e-4]
    )


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
    torch.manual_seed(1)
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


def test_weights_and_betas_decay_biases_and_scales_do_not():
    model = recipe.network("bn", 10, 0.02)
    vk.attach(model, torch.randn(1, 3, 32, 32))
    names = {id(p): name for name, p in model.named_parameters()}
    for decay_beta in (True, False):
        decayed, free = parameter_groups(model, 1e-4, decay_beta=decay_beta)
        assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
        found = {names[id(p)] for p in decayed["params"]}
        betas = {name for name in names.values() if name.endswith("beta")}
        assert len(betas) == 10
        assert found == {f"{i}.weight" for i, m in enumerate(model) if isinstance(m, nn.Conv2d)} | (
            betas if decay_beta else set()
        )
        assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_crops_are_parts_of_the_image_in_a_border_of_zeros():
    torch.manual_seed(0)
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


def images(count=60, classes=10):
    torch.manual_seed(7)
    x, y = torch.randn(count, 3, 32, 32), torch.randint(classes, (count,))
    return Data(x, y, x[:20], y[:20], classes)


def small(method, epochs=3):
    return runs.Run("0", "cifar10", method, 5, 0.05, epochs, 0.03, 10)


def new(run, data, dtype=torch.bfloat16):
    return training.Training(run, data, dtype=dtype, device=CPU)


def comparable(record):
    """The record without what may differ between a run and the same run interrupted: times, and the interruptions."""
    times = {column: values for column, values in record["epochs"].items() if column != "cpu_seconds"}
    return {**record, "epochs": times, "resumed_after_epochs": None}


@pytest.mark.parametrize("method", runs.BASE)
def test_an_interrupted_run_equals_one_that_was_not(tmp_path, monkeypatch, method):
    monkeypatch.setattr(training, "BATCH", 20)
    data, run, store = images(), small(method), files.Store(tmp_path / "results", tmp_path / "state")
    whole = new(run, data)
    for _ in range(3):
        whole.epoch()
    first = new(run, data)
    first.epoch()
    store.save(first)
    calls = iter([False, True])
    with pytest.raises(training.Stopped):
        first.epoch(lambda: next(calls))
    torch.manual_seed(99)  # another process, with other random numbers
    for _ in range(2):
        part = new(run, data)
        store.resume(part)
        part.epoch()
        store.save(part)
    assert part.finished
    assert part.record["resumed_after_epochs"] == [1, 2]
    assert comparable(part.record) == comparable(whole.record)
    states = zip(part.state()["model"].values(), whole.state()["model"].values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert len(whole.record["layers"]) == 4


def test_a_look_at_the_layers_leaves_the_training_as_it_is(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 20)
    seen, unseen = (new(small("vcl", 2), images()) for _ in range(2))
    monkeypatch.setattr(unseen, "_look", lambda: None)
    for one in (seen, unseen):
        one.epoch()
        one.epoch()
    assert seen.record["epochs"]["train_loss"] == unseen.record["epochs"]["train_loss"]
    (before, *_, after) = seen.record["layers"]
    assert (before["after_epochs"], after["after_epochs"]) == (0, 2)
    assert before["train_loss"] == pytest.approx(math.log(10), abs=0.02)
    for name in ("variance_by_channel", "constancy_by_activation", "beta", "beta_least", "gradient_share"):
        assert len(after[name]) == 10
        assert all(value > 0 for value in after[name])


def test_the_gradient_share_is_of_the_weight_before_the_activation(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 20)
    one = new(small("vcl"), images(), torch.float32)
    for module in one.learner.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    one._look()
    x, y = one.data.train_x[:20], one.data.train_y[:20]
    task, penalty = one.learner.losses(x, y)
    weight = next(m for m in one.learner.model if isinstance(m, nn.Conv2d)).weight
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (task, penalty)]
    assert one.record["layers"][0]["gradient_share"][0] == pytest.approx(float(norms[1] / norms[0]), rel=1e-4)


def test_a_batch_that_is_not_whole_is_left_out(monkeypatch):
    monkeypatch.setattr(training, "BATCH", 25)
    one = new(small("none"), images(60))
    steps = []
    monkeypatch.setattr(one.learner, "step", lambda x, y: steps.append(len(x)) or torch.zeros(2))
    one.epoch()
    assert steps == [25, 25]


def test_a_run_that_diverges_ends(tmp_path):
    one = new(small("none"), images())
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


def test_a_checkpoint_of_another_run_machine_or_data_is_refused(tmp_path):
    store, data = files.Store(tmp_path, tmp_path), images()
    store.save(new(small("none"), data))
    with pytest.raises(DataError, match=r"checkpoint.pt cannot be resumed; delete.*'epochs': 3.*'epochs': 9"):
        store.resume(new(small("none", epochs=9), data))
    with pytest.raises(DataError, match="of machine .*bfloat16.*not .*float32"):
        store.resume(new(small("none"), data, torch.float32))
    with pytest.raises(DataError, match="of images .*labels_crc32"):
        store.resume(new(small("none"), replace(data, train_y=data.train_y.flip(0))))
    (tmp_path / small("none").name / "checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(DataError, match=r"checkpoint.pt cannot be resumed"):
        store.resume(new(small("none"), data))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    files.replace_whole(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_whole(path, half)
    assert path.read_bytes() == b"old"


def test_records_are_json_with_a_line_for_each_column(tmp_path):
    one = new(small("vcl"), images())
    one.epoch()
    text = records.text(one.record)
    found = json.loads(text)
    assert found["run"] == {**one.record["run"]}
    assert found["epochs"]["test_nll"] == [pytest.approx(one.record["epochs"]["test_nll"][0], rel=1e-5)]
    assert text.count("\n") < 30

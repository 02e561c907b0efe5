"""The CIFAR study: the authors' recipe written out, runs that survive interruption, the queue, the plan."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cifar_files import write_packed
from torch import nn
from torch.nn import functional as F

import vcl_kernels as vk
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.cifar import agenda, files, machine, recipe, runs, training
from benchmarks.accuracy.options import RESULTS
from benchmarks.demo.data import Data
from benchmarks.demo.learner import parameter_groups

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the paper's 2x2 kernels


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def by_hand(model, x, y, momentum, rate, vcl):
    """One step of Nesterov SGD on {name: (parameter, velocity)}, each gradient clipped, with formulas written out."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss = loss + vcl() if vcl else loss
    gradients = torch.autograd.grad(loss, [p for _, p in model.named_parameters()])
    after = {}
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        g = g / max(1.0, float(g.norm()))
        norm_scale = name.endswith("weight") and p.dim() == 1
        if not name.endswith("bias") and not norm_scale:
            g = g + 1e-4 * p.detach()
        velocity = momentum[name] = 0.9 * momentum.get(name, torch.zeros_like(g)) + g
        after[name] = p.detach() - rate * (g + 0.9 * velocity)
    return after


@pytest.mark.parametrize("method", runs.BASE)
def test_steps_of_the_learner_equal_steps_by_hand(method):
    torch.manual_seed(1)
    x, y = torch.randn(12, 3, 32, 32), torch.randint(10, (12,))
    model = recipe.network(method, 10, 0.05)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # for gradients so large that the clipping has to act
    handle = recipe.attach(model, method, x[:1])
    learner = recipe.ReferenceLearner(model, handle, steps=4, learning_rate=0.05, dtype=torch.float32)
    momentum, clipped = {}, False
    for step, rate in enumerate((0.05, 0.05, 0.01, 1e-3)):
        torch.manual_seed(step)
        expected = by_hand(model, x, y, momentum, rate, handle.loss if handle else None)
        torch.manual_seed(step)
        if method == "bn":
            for m in model:
                if isinstance(m, nn.BatchNorm2d):
                    m.reset_running_stats()
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
    for name in ("variance_by_channel", "constancy_by_activation", "beta", "gradient_share"):
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
    store.finish(one)
    record = store.record(one.run)
    assert record["epochs"]["train_loss"] == [None]
    assert files.score(record) == (float("inf"), float("inf"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    store, data = files.Store(tmp_path, tmp_path), images()
    store.save(new(small("none"), data))
    with pytest.raises(ValueError, match=r"checkpoint.pt cannot be resumed; delete.*'epochs': 3.*'epochs': 9"):
        store.resume(new(small("none", epochs=9), data))


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
    text = files.lines(one.record)
    found = json.loads(text)
    assert found["run"] == {**one.record["run"]}
    assert found["epochs"]["test_nll"] == [pytest.approx(one.record["epochs"]["test_nll"][0], rel=1e-5)]
    assert text.count("\n") < 30


ERRORS = {0.02: 30.0, 0.05: 20.0, 0.1: 25.0}  # of stage 0, by learning rate


def write(store, run, epochs=None, error=50.0, nll=1.0, machine_=None):
    """The record of a run that is finished, or was begun and has some epochs."""
    path = store.results / f"{run.name}.json" if epochs is None else store.state / run.name / "record.json"
    done = run.epochs if epochs is None else epochs
    columns = {column: [1.0] * done for column in training.COLUMNS} | {"test_error": [error] * done}
    record = {
        "run": asdict(run),
        "machine": machine_ or machine.describe(CPU),
        "diverged": False,
        "epochs": columns | {"test_nll": [nll] * done, "cpu_seconds": [36.0] * done},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def with_stage_0(tmp_path, methods=runs.BASE):
    store = files.Store(tmp_path / "results", tmp_path / "state")
    for run in runs.planned({}):
        if run.stage == "0" and run.method in methods:
            write(store, run, error=ERRORS[run.learning_rate])
    return store


def names(found):
    return [run.name for run in found]


def test_the_plan_has_the_runs_of_its_stages():
    found = list(runs.planned({}))
    assert len(set(names(found))) == len(found) == 9 + 24 + 24 + 12
    assert {(r.stage, r.dataset, r.epochs, r.k, r.held_out) for r in found} == {
        ("0", "cifar10", 20, 0.25, 5000),
        ("1", "cifar10", 60, 0.25, None),
        ("1b", "cifar10", 60, 0.25, None),
        ("2", "cifar100", 60, 0.25, None),
    }
    assert {(r.method, r.learning_rate) for r in found if r.stage == "0"} == {
        (method, rate) for method in runs.BASE for rate in (0.02, 0.05, 0.1)
    }


def test_the_rate_of_the_lowest_error_is_chosen_once_all_are_done(tmp_path):
    store = with_stage_0(tmp_path, ["none", "vcl"])
    assert store.rates() == {"none": 0.05, "vcl": 0.05}
    for run in runs.planned({}):
        if run.stage == "0" and run.method == "none" and run.learning_rate != 0.05:
            write(store, run, error=20.0, nll=0.5 if run.learning_rate == 0.1 else 2)
    assert store.rates()["none"] == 0.1
    by_name = {run.name: run for run in runs.planned(store.rates())}
    assert by_name["1-cifar10-none-seed3"].learning_rate == 0.1
    assert by_name["1b-cifar10-none-he-seed0"].learning_rate == 0.1
    assert by_name["1b-cifar10-vcl-relu-seed0"].learning_rate == 0.05
    assert by_name["1b-cifar10-gn-seed0"].learning_rate is None
    assert by_name["2-cifar100-bn-seed0"].learning_rate is None


def test_runs_are_taken_in_the_order_of_patterns_those_begun_first(tmp_path):
    store = with_stage_0(tmp_path)
    found = agenda.Agenda(store, ["2-*-seed1", "1-*"])
    assert names(found.possible())[:4] == [
        "2-cifar100-none-seed1",
        "2-cifar100-bn-seed1",
        "2-cifar100-vcl-seed1",
        "1-cifar10-none-seed0",
    ]
    by_name = {run.name: run for run in found.wanted()}
    write(store, by_name["1-cifar10-bn-seed4"], epochs=7)
    write(store, by_name["2-cifar100-none-seed1"])
    assert names(found.possible())[:2] == ["1-cifar10-bn-seed4", "2-cifar100-bn-seed1"]
    assert list(found.status(workers=2))[-1].startswith("1 finished, 1 begun, 25 to do; ")


def test_what_has_no_learning_rate_yet_waits(tmp_path):
    store = with_stage_0(tmp_path, ["none"])
    found = agenda.Agenda(store, ["1-*"])
    assert {run.method for run in found.possible()} == {"none"}
    reasons = {run.method: reason for run, reason in found.held_up()}
    assert reasons.keys() == {"bn", "vcl"}
    assert "stage 0" in reasons["vcl"]


def test_a_seed_goes_on_only_on_the_kind_of_cpu_where_it_began(tmp_path):
    store = with_stage_0(tmp_path)
    found = agenda.Agenda(store, ["1-*", "1b-*", "2-*"])
    by_name = {run.name: run for run in found.wanted()}
    elsewhere = {"kind": "Another CPU", "dtype": "float32"}
    write(store, by_name["1-cifar10-none-seed0"], machine_=elsewhere)
    write(store, by_name["1-cifar10-bn-seed2"], epochs=3, machine_=elsewhere)
    waiting = {name for name in by_name if name.startswith("1") and name.endswith(("seed0", "seed2"))}
    waiting.remove("1-cifar10-none-seed0")
    assert {run.name for run, _ in found.held_up()} == waiting
    assert not waiting & set(names(found.possible()))
    assert "1-cifar10-vcl-seed1" in names(found.possible())
    assert "2-cifar100-vcl-seed0" in names(found.possible())
    reason = next(reason for _, reason in found.held_up())
    assert "waits for Another CPU (float32)" in reason


def test_hours_left_are_of_epochs_and_their_times(tmp_path):
    store = with_stage_0(tmp_path)
    found = agenda.Agenda(store, ["1-*-seed0"])
    assert "not known" in agenda.Agenda(files.Store(tmp_path / "no", tmp_path / "no"), ["1-*"]).hours_left(2)
    by_name = {run.name: run for run in found.wanted()}
    write(store, by_name["1-cifar10-none-seed0"], epochs=10)
    assert found.hours_left(1) == "1.7 hours left"  # 170 epochs of 36 seconds
    assert found.hours_left(2) == "0.8 hours left"


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags : fpu avx512f avx512_bf16", torch.bfloat16),
        ("flags : fpu avx512f amx_bf16", torch.bfloat16),
        ("flags : fpu avx512f", torch.float32),
        ("Features : fp asimd bf16", torch.bfloat16),
    ],
)
def test_the_kind_of_cpu_and_its_dtype(tmp_path, monkeypatch, flags, dtype):
    text = f"processor : 0\ncpu family : 25\nmodel : 17\nmodel name : Some CPU\n{flags}\n\nprocessor : 1\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "INFO", tmp_path / "cpuinfo")
    assert machine.kind(CPU) == "Some CPU, family 25, model 17"
    assert machine.dtype(CPU) == dtype
    monkeypatch.setattr(machine, "INFO", tmp_path / "none")
    assert machine.kind(CPU)
    assert machine.dtype(CPU) == torch.float32


def command(tmp_path, *arguments):
    folders = ["--state", tmp_path / "state", "--results", tmp_path / "results", "--data-dir", tmp_path / "data"]
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.accuracy", "cifar", "--quick", *folders, *arguments]


def record_of(tmp_path, name):
    path = tmp_path / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def wait_until(condition, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_queue_can_be_stopped_and_started_again(tmp_path, capsys):
    write_packed(tmp_path / "data", 10, training=6000, tested=100)
    name = "0-cifar10-vcl-rate0.1-seed0"
    asked = command(tmp_path, "--runs", name, "--workers", "1")
    for done, number in enumerate((signal.SIGTERM, signal.SIGINT), 1):
        with subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            wait_until(lambda done=done: epochs_begun(tmp_path, name) == done)
            process.send_signal(number)
            printed = process.communicate(timeout=60)[0]
        assert process.returncode == 0
        assert "the same command goes on" in printed
        assert f"{name}: epoch {done} of 3" in printed
        assert "hours left" in printed
        assert record_of(tmp_path, name) is None
    assert main(list(map(str, asked[5:]))) == 0
    found = record_of(tmp_path, name)
    assert found["resumed_after_epochs"] == [1, 2]
    assert len(found["epochs"]["test_error"]) == 3
    assert found["run"]["held_out"] == 0.2
    assert found["images"] == {"training": 4800, "scored": 1200}
    assert main([*map(str, asked[5:]), "--status"]) == 0
    assert f"{name}: epoch 3 of 3" in capsys.readouterr().out


def epochs_begun(tmp_path, name):
    path = tmp_path / "state" / name / "record.json"
    return len(json.loads(path.read_text())["epochs"]["test_error"]) if path.exists() else 0


def test_a_second_queue_is_kept_out_and_a_run_that_fails_is_named(tmp_path, capsys):
    from benchmarks.accuracy.cifar.queue import only_one

    arguments = command(tmp_path, "--runs", "0-cifar10-bn-rate0.1*")[5:]
    with only_one(tmp_path / "state"):
        assert main(list(map(str, arguments))) == 2
    assert f"process {os.getpid()} is at work" in capsys.readouterr().err
    assert main(list(map(str, arguments))) == 2  # there is no data
    assert "0-cifar10-bn-rate0.1-seed0 failed" in capsys.readouterr().err
    assert main(["cifar", "--quick", "--state", str(tmp_path / "state")]) == 2
    assert "--data-dir" in capsys.readouterr().err


def gpu(tmp_path, *arguments):
    folders = ["--data-dir", tmp_path / "data", "--state", tmp_path / "state", "--results", tmp_path / "results"]
    small_ = ["--k", "0.02", "--epochs", "3", "--device", "cpu"]
    return main(list(map(str, ["cifar-gpu", *folders, *small_, *arguments])))


def test_on_one_device_methods_take_turns_within_a_budget(tmp_path, monkeypatch, capsys):
    write_packed(tmp_path / "data", 10, training=40, tested=20)
    took = []
    epoch = training.Training.epoch
    monkeypatch.setattr(
        training.Training, "epoch", lambda self: (took.append((self.run.seed, self.run.method)), epoch(self))
    )
    assert gpu(tmp_path, "--budget", "0.001", "--seeds", "1") == 0
    assert took == []
    assert gpu(tmp_path, "--budget", "1000", "--seeds", "2") == 0
    assert took == [(seed, method) for seed in (0, 1) for _ in range(3) for method in runs.BASE]
    for method in runs.BASE:
        record = record_of(tmp_path, f"gpu-cifar10-{method}-seed1")
        assert len(record["epochs"]["test_error"]) == 3
    assert gpu(tmp_path, "--budget", "1000", "--seeds", "2") == 0
    assert len(took) == 18
    assert "gpu-cifar10-vcl-seed0: epoch 3 of 3" in capsys.readouterr().out


def test_a_budget_that_ends_leaves_records_and_what_goes_on(tmp_path, monkeypatch):
    write_packed(tmp_path / "data", 10, training=40, tested=20)
    from benchmarks.accuracy.cifar import turns

    clock = iter(range(1000))
    monkeypatch.setattr(turns.time, "monotonic", lambda: next(clock))
    assert gpu(tmp_path, "--budget", "16", "--seeds", "1") == 0
    done = {m: len(record_of(tmp_path, f"gpu-cifar10-{m}-seed0")["epochs"]["test_error"]) for m in runs.BASE}
    assert 1 <= min(done.values()) <= max(done.values()) < 3
    monkeypatch.undo()
    assert gpu(tmp_path, "--budget", "1000", "--seeds", "1") == 0
    for method in runs.BASE:
        record = record_of(tmp_path, f"gpu-cifar10-{method}-seed0")
        assert len(record["epochs"]["test_error"]) == 3
        assert record["resumed_after_epochs"] == [done[method]]


FINISHED = sorted((RESULTS / "cifar").glob("*.json"))


@pytest.mark.parametrize("path", FINISHED, ids=lambda path: path.stem)
def test_finished_runs_are_those_of_the_plan(path):
    store = files.Store(RESULTS / "cifar", RESULTS)
    by_name = {run.name: run for run in runs.planned(store.rates())}
    record = json.loads(path.read_text())
    assert record["run"] == asdict(by_name[path.stem])
    assert {len(column) for column in record["epochs"].values()} == {record["run"]["epochs"]}
    images_ = (45_000, 5_000) if record["run"]["stage"] == "0" else (50_000, 10_000)
    assert tuple(record["images"].values()) == images_
    assert record["machine"]["dtype"] in ("bfloat16", "float32")


def test_the_methods_of_a_seed_ran_on_one_kind_of_cpu_in_one_dtype():
    seen = {}
    for path in FINISHED:
        record = json.loads(path.read_text())
        run = record["run"]
        seen.setdefault((run["dataset"], run["held_out"], run["seed"]), set()).add(tuple(record["machine"].values()))
    assert {seed: found for seed, found in seen.items() if len(found) > 1} == {}

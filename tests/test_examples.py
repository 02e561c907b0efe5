"""The demo: one short run from end to end, its measures, what a wrong option gives."""

import json
import math

import numpy as np
import pytest
import torch

from examples.demo import measure
from examples.demo.__main__ import main
from examples.demo.learning import Settings, build, load
from examples.demo.record import strict

CPU = torch.device("cpu")


def test_a_validation_part_leaves_the_test_images_out():
    found, tuned = (load("digits", validate=validate, limit=None, device=CPU) for validate in (False, True))
    assert found.train_x.shape == (1437, 1, 8, 8)
    assert len(found.test_x) == 360
    assert abs(found.train_x.mean()) < 1e-5
    assert abs(found.train_x.std(correction=0) - 1) < 1e-5
    assert found.train_y.unique().tolist() == list(range(10))
    assert len(tuned.train_x) + len(tuned.test_x) == len(found.train_x)


@pytest.mark.parametrize(("method", "undecayed"), [("none", 6), ("bn", 11), ("vcl", 11)])
def test_weights_decay_and_methods_start_from_the_same(method, undecayed):
    learners = [
        build(m, torch.randn(1, 1, 8, 8), 3, Settings(10, 0.1, 1e-4, 0.01, 5, "ratio")) for m in (method, "none")
    ]
    decayed, free = learners[0].optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
    assert len(free["params"]) == undecayed  # biases; scales and biases of norms; beta of five layers
    for weights in zip(decayed["params"], learners[1].optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(*weights)


def test_saved_bytes_count_a_storage_once():
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert measure.saved_bytes(lambda: x.exp()) == 40
    assert measure.saved_bytes(lambda: (x * w, x[:2] * w[:2])) == 80
    assert measure.saved_bytes(lambda: (x * w, x * w), [w]) == 40


def test_kurtosis_of_two_points_is_one_and_of_a_gaussian_three():
    found = measure.kurtosis(torch.stack([torch.arange(200_000.0) % 2, torch.randn(200_000)]))
    assert found.tolist() == pytest.approx([1, 3], abs=0.05)


def test_a_loss_that_diverged_is_null_in_the_record():
    assert strict({"loss": [1.5, math.nan], "of": {"error": math.inf}}) == {"loss": [1.5, None], "of": {"error": None}}


@pytest.mark.parametrize("wrong", [["--batch-size", "8"], ["--seeds", "0"], ["--device", "nowhere"]])
def test_a_wrong_option_ends_with_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(wrong)
    assert exit_.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_quick_run_writes_a_record_and_a_picture(tmp_path, capsys):
    arguments = ["--quick", "--dataset", "digits", "--seeds", "1", "--device", "cpu", "--threads", "1"]
    main([*arguments, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "demo.json").read_text())
    assert set(record["methods"]) == {"none", "bn", "vcl"}
    for result in record["methods"].values():
        (losses,), (accuracies,) = result["train_loss"], result["test_accuracy"]
        assert len(losses) == len(accuracies) == 2
        assert math.isfinite(losses[0])
        assert losses[1] < losses[0]
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        assert len(result["step_ms"]) == 5
        density, edges = result["pre_activations"]["density"], result["pre_activations"]["edges"]
        assert np.dot(density, np.diff(edges)) == pytest.approx(1, abs=1e-3)
    assert record["methods"]["bn"]["saved_bytes"] > record["methods"]["vcl"]["saved_bytes"] > 0
    assert {"torch", "vcl_kernels"} <= set(record["versions"])
    picture = (tmp_path / "demo.png").read_bytes()
    assert (picture[:8], picture[-12:]) == (b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB\x60\x82")
    printed = capsys.readouterr().out
    assert "batch norm" in printed
    assert "demo.json" in printed

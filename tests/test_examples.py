"""The demo: one short run from end to end, its measures and statistics, its schedule, what a wrong option gives."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from examples.demo import comparison, measure
from examples.demo.__main__ import main
from examples.demo.comparison import Difference, paired
from examples.demo.data import load
from examples.demo.learning import Settings, build
from examples.demo.options import FEWEST, MOST
from examples.demo.progress import Bars
from examples.demo.record import strict
from examples.demo.schedule import COMPARED, Schedule
from examples.demo.training import Plan, Task
from examples.demo.work import trained

VCL = {"weight": 0.01, "unit": "activation", "sub_batch_size": 5, "form": "ratio"}


def test_a_split_draws_other_images_and_tests_on_the_rest():
    first, second = (load("digits", 1000, split, "cpu") for split in (0, 1))
    assert first.train_x.shape == (1000, 1, 8, 8)
    assert first.test_x.shape == (797, 1, 8, 8)
    assert abs(first.train_x.mean()) < 1e-5
    assert abs(first.train_x.std(correction=0) - 1) < 1e-5
    assert first.train_y.unique().tolist() == list(range(10))
    assert not torch.equal(first.train_y, second.train_y)


@pytest.mark.parametrize(("method", "undecayed"), [("none", 6), ("bn", 11), ("vcl", 6), ("modes", 6)])
def test_weights_decay_and_methods_start_from_the_same(method, undecayed):
    learners = [build(m, torch.randn(1, 1, 8, 8), 3, Settings(10, 0.1, 1e-4, VCL)) for m in (method, "none")]
    decayed, free = learners[0].optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
    assert len(free["params"]) == undecayed  # biases; scales and biases of norms
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


def test_a_difference_is_that_of_pairs():
    found = paired([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert found.mean == pytest.approx(2)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom; s = 1
    assert not found.decided
    assert paired([3.0, 4.1, 5.0], [2.0, 3.0, 4.1]).decided
    assert paired([2.0, 3.0, 4.0], [3.0, 4.1, 4.9]).decided
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired([1.0], [1.0, 2.0])


def test_nothing_is_decided_by_one_split_or_equal_or_diverged_trainings():
    assert math.isnan(paired([1.0], [2.0]).half)
    for a, b in (([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0]), ([1.0, math.nan], [2.0, 3.0])):
        assert not paired(a, b).decided


def test_sentences_claim_what_is_decided_and_nothing_else():
    lower, open_, higher = Difference(-0.4, 0.2, 10), Difference(-0.004, 0.01, 10), Difference(0.05, 0.01, 10)
    first = comparison.sentence("VCL", "none", lower, open_)
    assert "test error is lower (-0.40 ± 0.20 points: decided" in first
    assert "the difference in negative log-likelihood is not decided (-0.004 ± 0.010: the 95 % interval incl" in first
    assert "negative log-likelihood is higher (+0.050 ± 0.010: decided" in comparison.sentence(
        "VCL", "b", open_, higher
    )
    one = Difference(-3.0, math.nan, 1)
    assert comparison.sentence("VCL", "none", one, one) == "VCL against none: nothing is decided by 1 split(s)."


def begun(seconds, per_training, at_a_time, splits=None):
    """Return how many splits begin, each taking its time, and how many were expected after the first."""
    schedule, left, expected = Schedule(splits, at_a_time), seconds, []
    while schedule.begins(left):
        schedule.begun += 1
        schedule.seconds += [per_training] * 3
        left -= 3 * per_training / at_a_time
        expected.append(schedule.expected(left))
    return schedule.begun, expected[0]


def test_as_many_splits_begin_as_fit():
    assert begun(140, 9.0, 1) == (5, 5)
    assert begun(140, 7.0, 2) == (MOST, MOST)
    assert begun(140, 60.0, 2) == (FEWEST, FEWEST)
    assert begun(0, 60.0, 1, splits=6) == (6, 6)
    waiting = Schedule(None, 64)  # nothing has ended, and there are cores to spare
    for _ in range(MOST):
        assert waiting.begins(100)
        waiting.begun += 1
    assert not waiting.begins(100)


@pytest.mark.usefixtures("one_thread")
def test_processes_find_what_this_one_finds():
    plan = Plan("digits", 100, 1, 20, 0.05, 5e-4, "cpu", VCL)
    tasks = [Task(plan, method, 0) for method in ("none", "vcl")]
    told: list[tuple[Task, int]] = []
    together = dict(trained(iter(tasks), 2, lambda *news: told.append(news)))
    alone = dict(trained(iter(tasks), 1, lambda *_: None))
    assert together.keys() == alone.keys() == set(tasks)
    assert set(told) <= {(task, epoch) for task in tasks for epoch in (0, 1)}
    assert told
    for task in tasks:
        assert together[task]["test_nll"] == alone[task]["test_nll"]


def test_news_of_a_training_that_has_ended_changes_nothing():
    written = io.StringIO()
    bars = Bars(Console(file=written, force_terminal=True, width=90), 3)
    tasks = [Task(Plan("digits", 100, 3, 20, 0.05, 5e-4, "cpu", VCL), method, FEWEST) for method in COMPARED]
    with bars.progress:
        for task in tasks:
            bars.tell(task, 2)
            bars.end(task, {"test_error": [9.0, 4.5]}, 3)
            bars.tell(task, 3)
    assert [bar.completed for bar in bars.progress.tasks] == [3]  # that of all trainings
    assert "split 5: error with no normalisation 4.50 %, batch norm 4.50 %, VCL 4.50 %" in written.getvalue()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--batch-size", "8"],
        ["--batch-size", "1001"],
        ["--images", "5000"],
        ["--splits", "0"],
        ["--minutes", "0"],
        ["--weight", "nan"],
        ["--epochs", "many"],
        ["--device", "nowhere"],
    ],
)
def test_a_wrong_option_ends_with_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(wrong)
    assert exit_.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_quick_run_writes_a_record_and_a_picture(tmp_path, capsys):
    arguments = ["--quick", "--dataset", "digits", "--images", "200", "--device", "cpu", "--threads", "1"]
    main([*arguments, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "demo.json").read_text())
    assert set(record["methods"]) == {"none", "bn", "vcl", "modes"}
    assert record["tested_after"] == [1, 2]
    for result in record["methods"].values():
        assert len(result["runs"]) == 2
        for run in result["runs"]:
            assert len(run["train_loss"]) == len(run["test_nll"]) == 2
            assert run["train_loss"][1] < run["train_loss"][0]
            assert all(0 <= error <= 100 for error in run["test_error"])
            assert np.shape(run["variance"]) == (3, 5)
        assert len(result["step_ms"]) == 5
        for seen in result["runs"][0]["histograms"]:
            assert np.dot(seen["density"], np.diff(seen["edges"])) == pytest.approx(1, abs=1e-3)
    summary = record["summary"]["rows"]
    assert summary["none"]["error_difference"]["mean"] == 0
    assert summary["modes"]["kurtosis"] < summary["none"]["kurtosis"]
    assert record["methods"]["bn"]["saved_bytes"] > record["methods"]["vcl"]["saved_bytes"] > 0
    assert {"torch", "vcl_kernels"} <= set(record["versions"])
    picture = (tmp_path / "demo.png").read_bytes()
    assert (picture[:8], picture[-12:]) == (b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB\x60\x82")
    printed = capsys.readouterr().out
    assert "VCL against no normalisation, 2 splits" in printed
    assert "demo.json" in printed

"""The speed benchmark: how candidates are raced, what must move, what a report says; a rehearsal of the suites."""

import json
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.cases import Case, cases
from benchmarks.speed import report
from benchmarks.speed.__main__ import main
from benchmarks.speed.candidates import Inputs, activations, floor_bytes, losses
from benchmarks.speed.race import Candidate, Contest, WallClock, race

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


class Counted:
    """A clock that takes no time: the first lap of a name is 1 s, the second 2 s, …; backward is ten times that."""

    def __init__(self):
        self.order = []

    def lap(self, candidate):
        self.order.append(candidate.forward())
        seconds = float(self.order.count(self.order[-1]))
        return (seconds,) if self.order[-1] == "whole" else (seconds, 10 * seconds)


def test_candidates_take_turns_and_the_first_rounds_are_not_counted():
    clock = Counted()
    found = race({name: Candidate(lambda name=name: name) for name in ("a", "whole")}, clock, 0, least=2, most=5)
    assert len(clock.order) == 10  # three rounds to warm up, two counted
    assert all(set(clock.order[i : i + 2]) == {"a", "whole"} for i in range(0, 10, 2))
    assert found["a"] == {"forward": [4, 5], "backward": [40, 50], "both": [44, 55]}
    assert found["whole"] == {"forward": [], "backward": [], "both": [4, 5]}


def test_a_round_differentiates_from_fresh_gradients():
    x = torch.ones(3, requires_grad=True)
    candidate = Candidate(lambda: [2 * x], [torch.full((3,), 5.0)], [x])
    laps = [WallClock("cpu").lap(candidate) for _ in range(2)][-1]
    assert x.grad.tolist() == [10, 10, 10]
    assert len(laps) == 2
    assert all(seconds > 0 for seconds in laps)


def test_a_candidate_that_fails_does_not_stop_the_others():
    def fails():
        raise MemoryError("too large")

    factories = {name: lambda: Candidate(lambda: None) for name in ("good", "not asked for")}
    contest = Contest("c", {**factories, "bad": fails}, lambda: WallClock("cpu"), seconds=0, least=1)
    outcome = contest.run(["good", "bad"])
    assert list(outcome.samples) == ["good"]
    assert isinstance(outcome.errors["bad"], MemoryError)
    contest.clock = fails  # an error of the race itself is that of each candidate
    assert set(contest.run(["good", "bad"]).errors) == {"good", "bad"}


@pytest.mark.parametrize(
    ("candidate", "phase", "passes"),
    [
        ("copy", "both", 2),
        ("copy", "forward", None),
        ("relative_variance", "forward", 2),  # x read, dx written; 24 of 24 rows take part
        ("relative_variance", "backward", None),
        ("ratio", "both", 3 * 10 / 24 + 1),  # ten rows read, saved, read again; dx written
        ("elu", "both", 5),
        ("elu with relative_variance", "both", 5),
        ("gelu with ratio", "both", 5),
        ("elu with ratio", "both", 5 + 2 * 10 / 24),
        ("batch norm", "both", None),
    ],
)
def test_floors_are_passes_over_the_elements(candidate, phase, passes):
    found = floor_bytes(Case((24, 6, 4, 4), dtype="bfloat16"), candidate, phase)
    assert found == (None if passes is None else pytest.approx(passes * 24 * 6 * 16 * 2))


@pytest.mark.parametrize("case", [Case((24, 6, 4, 5)), Case((24, 8, 4, 4), "channels_last", "bfloat16"), Case((24, 8))])
def test_every_candidate_runs_and_gives_a_gradient(case):
    i = Inputs(case, "cpu", None)
    for factories in (losses(i), activations(i)):
        for name, make in factories.items():
            laps = WallClock("cpu").lap(make())
            assert len(laps) == (1 if name == "copy" else 2), name
            if name != "copy":
                assert i.x.grad.shape == case.shape
                assert i.x.grad.isfinite().all(), name


def test_layouts_of_cases():
    assert Case((4, 6, 5), "tokens").tensor("cpu").stride() == (30, 1, 6)
    assert Case((4, 6, 5, 3), "channels_last").tensor("cpu").is_contiguous(memory_format=torch.channels_last)
    for device, first in (("cpu", "64x64x56x56 float32"), ("cuda", "64x256x56x56 float32")):
        found = cases(device, rehearse=False)
        assert len(set(found)) == len(found)
        assert str(found[0]) == first


def test_a_report_divides_what_it_says():
    def entry(candidate, median, **more):
        return {"case": "c", "bytes": 8, "candidate": candidate, "phase": "both", "median": median, **more}

    of_loss = entry("relative_variance", 2e-3, floor_bytes=3_000_000, held_bytes=4_000_000)
    entries = [entry("copy", 1e-3, floor_bytes=2_000_000), of_loss, entry("batch norm", 8e-3)]
    text = report.render({"suite": "loss", "machine_info": {"device": "d"}, "benchmarks": entries})
    assert "| c | 2.00x | 0.25x |  |  |  |" in text
    assert "| c | 1 | 2 (75 %) | 8 |" in text  # 1.5 of the copy's bytes in twice its time
    assert "| c | 2.0 | 2 | 3 |" in text  # GB/s of the copy, MB that must move
    assert "| c | 4 |" in text


@pytest.fixture
def rehearse(monkeypatch, capsys):
    """Rehearse a suite by its command, or by pytest alone, in this process; return exit code and what is printed."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under which nothing is timed
    on_sigterm = signal.getsignal(signal.SIGTERM)

    def run(function, *options):
        monkeypatch.setattr(sys, "argv", ["speed", *map(str, options), "--rehearse"])
        return function(), capsys.readouterr().out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the inner pytest
        yield run
    signal.signal(signal.SIGTERM, on_sigterm)


def test_networks_are_rehearsed_and_every_sample_is_written(tmp_path, rehearse):
    assert rehearse(main, "networks", "--out", tmp_path)[0] == 0
    record = json.loads((tmp_path / "networks.json").read_text())
    methods = {"no normalisation", "batch norm", "VCL, ratio", "VCL, relative_variance"}
    assert {e["candidate"] for e in record["benchmarks"]} == methods
    for e in record["benchmarks"]:
        assert len(e["seconds"]) >= 2
        assert min(e["seconds"]) <= e["median"] <= max(e["seconds"])
        assert e["held_bytes"] > 0
    committed = json.loads((ROOT / "benchmarks/results/cpu-epyc/networks.json").read_text())
    assert [list(record), list(record["machine_info"])] == [list(committed), list(committed["machine_info"])]
    assert list(record["benchmarks"][0]) == list(committed["benchmarks"][0])
    assert record["machine_info"]["torch"] == torch.__version__
    assert (tmp_path / "networks.md").read_text() == report.render(record)


def test_pytest_races_what_is_selected_in_groups_of_one_phase(rehearse):
    selected = "test_loss and 20x8 and forward and (norm or ratio) and not activation"
    code, printed = rehearse(pytest.main, ROOT / "benchmarks/speed", "--benchmark-only", "-k", selected)
    assert code == 0
    assert "benchmark '20x8 float32, forward': 3 tests" in printed
    for name in ("ratio", "batch_norm", "layer_norm"):
        assert f"test_loss[20x8_float32-{name}-forward]" in printed


def test_no_contest_begins_after_the_budget(tmp_path, rehearse):
    code, printed = rehearse(main, "launch", "--out", tmp_path, "--budget", "1e-9")
    assert code == 0
    assert "no time left" in printed
    assert not (tmp_path / "launch.json").exists()

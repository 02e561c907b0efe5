"""The benchmark suites: how candidates are raced, what must move, what a report says; a rehearsal of each suite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench, report
from benchmarks.candidates import Inputs, activations, floor_bytes, losses
from benchmarks.cases import Case, cases
from benchmarks.contest import Contest
from benchmarks.memory import saved_bytes
from benchmarks.race import Candidate, WallClock, race

ROOT = Path(__file__).parent.parent


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
    WallClock("cpu").lap(Candidate(lambda: [2 * x], [torch.full((3,), 5.0)], [x]))
    laps = WallClock("cpu").lap(Candidate(lambda: [2 * x], [torch.full((3,), 5.0)], [x]))
    assert x.grad.tolist() == [10, 10, 10]
    assert len(laps) == 2
    assert all(seconds > 0 for seconds in laps)


def test_a_candidate_that_fails_does_not_stop_the_others():
    def fails():
        raise MemoryError("too large")

    contest = Contest("c", {"good": lambda: Candidate(lambda: None), "bad": fails}, lambda: WallClock("cpu"), least=1)
    contest.seconds = 0
    outcome = contest.run()
    assert list(outcome.samples) == ["good"]
    assert isinstance(outcome.errors["bad"], MemoryError)


@pytest.mark.parametrize(
    ("candidate", "phase", "passes"),
    [
        ("copy", "both", 2),
        ("relative_variance", "forward", 2),  # x read, dx written; 24 of 24 rows take part
        ("relative_variance", "backward", None),
        ("ratio", "both", 3 * 10 / 24 + 1),  # ten rows read, kept, read again; dx written
        ("elu", "both", 5),
        ("elu with relative_variance", "both", 5),
        ("gelu with ratio", "both", 5),
        ("elu with ratio", "both", 5 + 2 * 10 / 24),
        ("batch norm", "both", None),
    ],
)
def test_floors_are_passes_over_the_elements(candidate, phase, passes):
    case = Case((24, 6, 4, 4), dtype="bfloat16")
    found = floor_bytes(case, candidate, phase)
    assert found == (None if passes is None else pytest.approx(passes * 24 * 6 * 16 * 2))


@pytest.mark.parametrize("case", [Case((24, 6, 4, 5)), Case((24, 8, 4, 4), "channels_last", "bfloat16"), Case((24, 8))])
def test_every_candidate_runs_and_gives_a_gradient(case):
    i = Inputs(case, "cpu", None)
    for factories in (losses(i, False), activations(i, False)):
        for name, make in factories.items():
            candidate = make()
            laps = WallClock("cpu").lap(candidate)
            if name == "copy":
                assert len(laps) == 1
                continue
            assert len(laps) == 2, name
            assert i.x.grad.shape == case.shape
            assert i.x.grad.isfinite().all(), name


def test_layouts_of_cases():
    assert Case((4, 6, 5), "tokens").tensor("cpu").stride() == (30, 1, 6)
    assert Case((4, 6, 5, 3), "channels_last").tensor("cpu").is_contiguous(memory_format=torch.channels_last)
    for device, first in (("cpu", "64x64x56x56 float32"), ("cuda", "64x256x56x56 float32")):
        found = cases(device, rehearse=False)
        assert len(set(found)) == len(found)
        assert str(found[0]) == first


def test_an_error_of_a_race_is_met_once():
    def broken():
        raise RuntimeError("out of memory")

    found = bench._outcome(Contest("c", {"a": broken, "b": broken}, lambda: broken()))
    assert set(found.errors) == {"a", "b"}


def test_saved_bytes_counts_a_storage_once():
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert saved_bytes(lambda: x.exp()) == 40
    assert saved_bytes(lambda: (x * w, x * w)) == 80
    assert saved_bytes(lambda: (x * w, x * w), [w]) == 40


def entry(candidate, phase, median, floor=None, held=None):
    found = {"case": "c", "bytes": 8, "candidate": candidate, "phase": phase, "median": median}
    found |= {} if floor is None else {"floor_bytes": floor}
    return found | ({} if held is None else {"held_bytes": held})


def test_a_report_divides_what_it_says():
    record = {
        "suite": "loss",
        "machine_info": {"device": "d"},
        "benchmarks": [
            entry("copy", "both", 1e-3, 2_000_000),
            entry("relative_variance", "both", 2e-3, 3_000_000, 4_000_000),
            entry("batch norm", "both", 8e-3),
        ],
    }
    text = report.render(record)
    assert "| c | 2.00x | 0.25x |  |  |  |" in text
    assert "| c | 1 | 2 (75 %) | 8 |" in text  # 1.5 of the copy's bytes in twice its time
    assert "| c | 2.0 | 2 | 3 |" in text  # GB/s of the copy, MB that must move
    assert "| c | 4 |" in text


def run(suite, folder, *arguments):
    command = [sys.executable, "-m", "benchmarks.run", suite, "--out", folder, "--rehearse", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}  # it writes no record
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_a_rehearsal_writes_every_sample(tmp_path):
    done = run("loss", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    record = json.loads((tmp_path / "loss.json").read_text())
    assert {e["candidate"] for e in record["benchmarks"]} >= {"copy", "relative_variance", "ratio", "batch norm"}
    for e in record["benchmarks"]:
        assert len(e["seconds"]) >= 2
        assert min(e["seconds"]) <= e["median"] <= max(e["seconds"])
    assert record["machine_info"]["torch"] == torch.__version__
    assert "node" not in record["machine_info"]
    assert (tmp_path / "loss.md").read_text() == report.render(record)


def test_networks_are_rehearsed(tmp_path):
    done = run("networks", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    record = json.loads((tmp_path / "networks.json").read_text())
    methods = {"no normalisation", "batch norm", "VCL, ratio", "VCL, relative_variance"}
    assert {e["candidate"] for e in record["benchmarks"]} == methods
    assert all(e["held_bytes"] > 0 for e in record["benchmarks"])


def test_no_contest_begins_after_the_budget(tmp_path):
    done = run("launch", tmp_path, "--budget", "1e-9")
    assert done.returncode == 0
    assert "no time left" in done.stdout
    assert not (tmp_path / "launch.json").exists()

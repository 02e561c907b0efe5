"""The CIFAR study: its plan, the queue that works it off, the turns on one GPU, the runs that are finished."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cifar_files import write_packed
from common import wait_until

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.cifar import agenda, files, machine, queue, records, runs, training, turns
from benchmarks.accuracy.cifar.process import Stop, only_one
from benchmarks.accuracy.options import RESULTS, parse
from benchmarks.accuracy.page import cifar as page

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # the paper's 2x2 kernels
]


ERRORS = {0.02: 30.0, 0.05: 20.0, 0.1: 25.0}  # of stage 0, by learning rate


def write(store, run, epochs=None, error=50.0, nll=1.0, machine_=None):
    """The record of a run that is finished, or was begun and has some epochs."""
    path = store.results / f"{run.name}.json" if epochs is None else store.state / run.name / "record.json"
    done = run.epochs if epochs is None else epochs
    columns = {column: [1.0] * done for column in records.COLUMNS} | {"test_error": [error] * done}
    record = {
        "run": asdict(run),
        "machine": machine_ or machine.describe(CPU, machine.dtype(CPU)),
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
    reasons = found.waiting()
    assert {name.split("-")[2] for name in reasons} == {"bn", "vcl"}
    assert "stage 0" in reasons["1-cifar10-vcl-seed5"]


def test_a_seed_goes_on_only_on_the_kind_of_cpu_where_it_began(tmp_path):
    store = with_stage_0(tmp_path)
    found = agenda.Agenda(store, ["1-*", "1b-*", "2-*"])
    by_name = {run.name: run for run in found.wanted()}
    elsewhere = {"kind": "Another CPU", "dtype": "float32"}
    write(store, by_name["1-cifar10-none-seed0"], machine_=elsewhere)
    write(store, by_name["1-cifar10-bn-seed2"], epochs=3, machine_=elsewhere)
    waiting = {name for name in by_name if name.startswith("1") and name.endswith(("seed0", "seed2"))}
    waiting.remove("1-cifar10-none-seed0")
    assert set(found.waiting()) == waiting
    assert not waiting & set(names(found.possible()))
    assert "1-cifar10-vcl-seed1" in names(found.possible())
    assert "2-cifar100-vcl-seed0" in names(found.possible())
    assert "waits for Another CPU (float32)" in found.waiting()["1-cifar10-bn-seed2"]
    assert agenda.Agenda(store, ["1-*-seed2"]).hours_left(1) == "0.0 hours left"


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


def asked(tmp_path, *more):
    """The arguments of a queue on tiny networks."""
    folders = ["--state", tmp_path / "state", "--results", tmp_path / "results", "--data-dir", tmp_path / "data"]
    return list(map(str, ["cifar", "--quick", *folders, *more]))


def record_of(tmp_path, name):
    path = tmp_path / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_the_queue_can_be_stopped_and_started_again_and_names_a_run_that_fails(tmp_path, capfd, monkeypatch):
    keep_environment(monkeypatch)
    write_packed(tmp_path / "data", 10, training=2500, tested=100)
    name = "0-cifar10-vcl-rate0.1-seed0"
    alone = asked(tmp_path, "--runs", name, "--workers", "1")
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.accuracy"]
    resumed = []
    for number, to_all in ((signal.SIGTERM, False), (signal.SIGINT, True)):  # the second as Ctrl-C does
        started = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen([*program, *alone], **started) as process:
            least = len(resumed) + 1
            wait_until(lambda least=least: epochs_begun(tmp_path, name) >= least)
            (os.killpg if to_all else os.kill)(process.pid, number)
            printed = process.communicate(timeout=60)[0]
        assert process.returncode == 0
        assert "the same command continues" in printed
        assert "hours left" in printed
        resumed.append(epochs_begun(tmp_path, name))
        assert f"{name}: epoch {resumed[-1]} of 6" in printed
        assert record_of(tmp_path, name) is None
    fails = "0-cifar10-bn-rate0.1-seed0"
    checkpoint = tmp_path / "state" / fails / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"cut off")
    assert main(asked(tmp_path, "--runs", name, fails, "--workers", "2")) == 2
    printed = capfd.readouterr().err
    assert f"{fails} failed" in printed
    assert f"{name} failed" not in printed
    assert f"{checkpoint} cannot be resumed; delete its folder" in printed
    found = record_of(tmp_path, name)
    assert found["resumed_after_epochs"] == resumed
    assert len(found["epochs"]["test_error"]) == 6
    assert (found["images"]["training"], found["images"]["scored"]) == (2000, 500)
    assert main([*alone, "--status"]) == 0
    assert f"{name}: epoch 6 of 6" in capfd.readouterr().out


def keep_environment(monkeypatch):
    """Put back at the end what the queue sets for its workers."""
    for name, value in queue.KEEP_MEMORY.items():
        monkeypatch.setenv(name, value)


def epochs_begun(tmp_path, name):
    path = tmp_path / "state" / name / "record.json"
    return len(json.loads(path.read_text())["epochs"]["test_error"]) if path.exists() else 0


def test_what_keeps_a_queue_from_starting_is_said_before_any_worker(tmp_path, capsys):
    arguments = asked(tmp_path, "--runs", "0-cifar10-bn-rate0.1*")
    assert main(arguments) == 2
    assert "data_batch_1 is missing" in capsys.readouterr().err
    write_packed(tmp_path / "data", 10)
    with only_one(tmp_path / "state"):
        assert main(arguments) == 2
    assert f"process {os.getpid()} is at work" in capsys.readouterr().err
    assert main(["cifar", "--quick", "--state", str(tmp_path / "state")]) == 2
    assert "--data-dir" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_no_worker_outlives_a_queue_that_ends_by_an_error(tmp_path, monkeypatch):
    keep_environment(monkeypatch)
    write_packed(tmp_path / "data", 10, training=100)
    stored = files.Store(tmp_path / "results", tmp_path / "state")
    at_work = queue.Queue(agenda.Agenda(stored, ["0-*-vcl-rate0.1-*"], quick=True), tmp_path / "data", 1, None)

    def broken():
        raise BrokenPipeError

    monkeypatch.setattr(at_work, "_follow", broken)
    with pytest.raises(BrokenPipeError):
        at_work.work(Stop())
    ((_, process),) = at_work.workers.values()
    assert not process.is_alive()


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


def test_a_budget_that_ends_leaves_records_and_what_continues(tmp_path, monkeypatch):
    write_packed(tmp_path / "data", 10, training=40, tested=20)
    clock = iter(range(1000))
    monkeypatch.setattr(turns, "monotonic", lambda: next(clock))
    assert gpu(tmp_path, "--budget", "16", "--seeds", "1") == 0
    done = {m: len(record_of(tmp_path, f"gpu-cifar10-{m}-seed0")["epochs"]["test_error"]) for m in runs.BASE}
    assert 1 <= min(done.values()) <= max(done.values()) < 3
    monkeypatch.undo()
    assert gpu(tmp_path, "--budget", "1000", "--seeds", "1") == 0
    for method in runs.BASE:
        record = record_of(tmp_path, f"gpu-cifar10-{method}-seed0")
        assert len(record["epochs"]["test_error"]) == 3
        assert record["resumed_after_epochs"] == [done[method]]


def test_an_error_on_the_device_leaves_checkpoints(tmp_path, monkeypatch):
    write_packed(tmp_path / "data", 10, training=40, tested=20)
    epoch, calls = training.Training.epoch, []

    def failing(self):
        calls.append(self.run.method)
        if len(calls) == 5:
            raise RuntimeError("CUDA error")
        epoch(self)

    monkeypatch.setattr(training.Training, "epoch", failing)
    with pytest.raises(RuntimeError, match="CUDA error"):
        gpu(tmp_path, "--budget", "1000", "--seeds", "1")
    monkeypatch.undo()
    assert gpu(tmp_path, "--budget", "1000", "--seeds", "1") == 0
    resumed = [record_of(tmp_path, f"gpu-cifar10-{m}-seed0")["resumed_after_epochs"] for m in runs.BASE]
    assert resumed == [[2], [1], [1]]


def test_a_record_of_other_settings_is_not_taken_for_the_run(tmp_path, capsys):
    write_packed(tmp_path / "data", 10, training=40, tested=20)
    assert gpu(tmp_path, "--budget", "1000", "--seeds", "1") == 0
    assert gpu(tmp_path, "--budget", "1000", "--seeds", "1", "--k", "0.03") == 2
    assert "cannot be resumed" in capsys.readouterr().err


def test_a_rehearsal_has_folders_of_its_own():
    given = ["cifar-gpu", "--budget", "1", "--data-dir", "data"]
    real, rehearsal = parse(given), parse([*given, "--device", "cpu"])
    assert real.results == RESULTS / "cifar-gpu"
    assert RESULTS not in rehearsal.results.parents
    assert real.state != rehearsal.state
    assert RESULTS not in parse(["cifar", "--quick"]).results.parents


FINISHED = sorted((RESULTS / "cifar").glob("*.json"))


@pytest.mark.parametrize("path", FINISHED, ids=lambda path: path.stem)
def test_finished_runs_are_those_of_the_plan(path):
    store = files.Store(RESULTS / "cifar", RESULTS)
    by_name = {run.name: run for run in runs.planned(store.rates())}
    record = json.loads(path.read_text())
    assert record["run"] == asdict(by_name[path.stem])
    (epochs,) = {len(column) for column in record["epochs"].values()}
    assert record["diverged"] or epochs == record["run"]["epochs"]
    images = (45_000, 5_000) if record["run"]["stage"] == "0" else (50_000, 10_000)
    assert (record["images"]["training"], record["images"]["scored"]) == images
    assert record["machine"]["dtype"] in ("bfloat16", "float32")


def test_the_methods_of_a_seed_ran_on_one_kind_of_cpu_in_one_dtype():
    seen = {}
    for path in FINISHED:
        record = json.loads(path.read_text())
        run = record["run"]
        seen.setdefault((run["dataset"], run["held_out"], run["seed"]), set()).add(tuple(record["machine"].values()))
    assert {seed: found for seed, found in seen.items() if len(found) > 1} == {}


def test_the_plan_has_the_learning_rates_that_stage_0_chose():
    tuned = [run for run in runs.planned({}) if run.stage == "0"]
    table = page.learning_rates(files.Store(RESULTS / "cifar", RESULTS), tuned)[2:]
    assert "\n".join(table).strip() in (Path(page.__file__).parents[1] / "PLAN.md").read_text()

"""The CIFAR study: its plan, the queue that works it off, the turns on one GPU, the runs that are finished."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cifar_files import write_packed
from common import wait_until

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.cifar import agenda, files, machine, queue, records, runs, training, turns
from benchmarks.accuracy.cifar.process import AUTOGROUP, Stop, only_one, stop_signals, take_lowest_priority
from benchmarks.accuracy.options import RESULTS, parse
from benchmarks.accuracy.page import cifar as page

CPU = torch.device("cpu")
ERRORS = {0.02: 30.0, 0.05: 20.0, 0.1: 25.0}  # of stage 0, by learning rate
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # the paper's 2x2 kernels
]


@pytest.fixture(autouse=True)
def environment():
    """Put back at the end what the queue sets for its workers."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def store(tmp_path):
    return files.Store(tmp_path / "results", tmp_path / "state")


@pytest.fixture
def tuned(store):
    """A store whose stage 0 is finished."""
    for run in runs.planned({}):
        if run.stage == "0":
            write(store, run, error=ERRORS[run.learning_rate])
    return store


def write(store, run, epochs=None, error=50.0, nll=1.0, made_on=None):
    """The record of a run that is finished, or was begun and has some epochs."""
    path = store.results / f"{run.name}.json" if epochs is None else store.state / run.name / "record.json"
    done = run.epochs if epochs is None else epochs
    columns = {column: [1.0] * done for column in records.COLUMNS} | {"test_error": [error] * done}
    record = {
        "run": asdict(run),
        "machine": made_on or machine.describe(CPU, machine.dtype(CPU)),
        "diverged": False,
        "epochs": columns | {"test_nll": [nll] * done, "cpu_seconds": [36.0] * done},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def wanted(store, *patterns):
    """An agenda, and its runs by name."""
    found = agenda.Agenda(store, list(patterns))
    return found, {run.name: run for run in found.wanted()}


def names(found):
    return [run.name for run in found]


def test_the_plan_has_the_runs_of_its_stages():
    found = list(runs.planned({}))
    assert len(set(names(found))) == len(found) == 9 + 24 + 24 + 12
    of_stages = {(r.stage, r.dataset, r.epochs, r.k, r.held_out) for r in found}
    assert of_stages == {("0", "cifar10", 20, 0.25, 5000)} | {
        (stage, data, 60, 0.25, None) for stage, data in (("1", "cifar10"), ("1b", "cifar10"), ("2", "cifar100"))
    }
    settings = {(r.method, r.learning_rate) for r in found if r.stage == "0"}
    assert settings == {(method, rate) for method in runs.BASE for rate in ERRORS}


def test_the_rate_of_the_lowest_error_is_chosen_once_all_are_done(tuned):
    (tuned.results / "0-cifar10-bn-rate0.1-seed0.json").unlink()
    assert tuned.rates() == {"none": 0.05, "vcl": 0.05}
    for run in runs.planned({}):
        if run.stage == "0" and run.method == "none" and run.learning_rate != 0.05:
            write(tuned, run, error=20.0, nll=0.5 if run.learning_rate == 0.1 else 2)
    assert tuned.rates()["none"] == 0.1
    rates = {run.name: run.learning_rate for run in runs.planned(tuned.rates())}
    assert rates["1-cifar10-none-seed3"] == rates["1b-cifar10-none-he-seed0"] == 0.1
    assert rates["1b-cifar10-vcl-relu-seed0"] == 0.05
    assert rates["1b-cifar10-gn-seed0"] is rates["2-cifar100-bn-seed0"] is None
    found = agenda.Agenda(tuned, ["1-*"])
    assert {run.method for run in found.possible()} == {"none", "vcl"}
    assert {name.split("-")[2] for name in found.waiting()} == {"bn"}
    assert "stage 0" in found.waiting()["1-cifar10-bn-seed5"]


def test_runs_are_taken_in_the_order_of_patterns_those_begun_first(tuned):
    found, by_name = wanted(tuned, "2-*-seed1", "1-*")
    first = [f"2-cifar100-{method}-seed1" for method in runs.BASE] + ["1-cifar10-none-seed0"]
    assert names(found.possible())[:4] == first
    write(tuned, by_name["1-cifar10-bn-seed4"], epochs=7)
    write(tuned, by_name["2-cifar100-none-seed1"])
    assert names(found.possible())[:2] == ["1-cifar10-bn-seed4", "2-cifar100-bn-seed1"]
    assert list(found.status(workers=2))[-1].startswith("1 finished, 1 begun, 25 to do; ")


def test_a_seed_goes_on_only_on_the_kind_of_cpu_where_it_began(tuned):
    found, by_name = wanted(tuned, "1-*", "1b-*", "2-*")
    elsewhere = {"kind": "Another CPU", "dtype": "float32"}
    write(tuned, by_name["1-cifar10-none-seed0"], made_on=elsewhere)
    write(tuned, by_name["1-cifar10-bn-seed2"], epochs=3, made_on=elsewhere)
    waiting = {name for name in by_name if name.startswith("1") and name.endswith(("seed0", "seed2"))}
    waiting.remove("1-cifar10-none-seed0")
    assert set(found.waiting()) == waiting
    assert not waiting & set(names(found.possible()))
    assert {"1-cifar10-vcl-seed1", "2-cifar100-vcl-seed0"} <= set(names(found.possible()))
    assert "waits for Another CPU (float32)" in found.waiting()["1-cifar10-bn-seed2"]
    assert agenda.Agenda(tuned, ["1-*-seed2"]).hours_left(1) == "0.0 hours left"


def test_hours_left_are_of_epochs_and_their_times(tuned):
    found, by_name = wanted(tuned, "1-*-seed0")
    assert "not known" in found.hours_left(2)
    write(tuned, by_name["1-cifar10-none-seed0"], epochs=10)
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


LOWEST = """
import os
from benchmarks.accuracy.cifar.process import AUTOGROUP, take_lowest_priority
take_lowest_priority()
print(os.nice(0), AUTOGROUP.read_text().split()[-1] if AUTOGROUP.exists() else 19)
"""


def test_a_worker_takes_the_lowest_priority_in_a_session_of_its_own(monkeypatch):
    before = AUTOGROUP.read_text() if AUTOGROUP.exists() else ""
    assert subprocess.check_output([sys.executable, "-c", LOWEST], cwd=RESULTS.parents[2], text=True) == "19 19\n"
    assert not before or AUTOGROUP.read_text() == before
    monkeypatch.setattr("benchmarks.accuracy.cifar.process.os", mock.Mock())
    for answers in ([BlockingIOError, 2], [PermissionError]):  # too early: asked again; not allowed: left as it is
        autogroup = mock.Mock(**{"write_text.side_effect": answers})
        monkeypatch.setattr("benchmarks.accuracy.cifar.process.AUTOGROUP", autogroup)
        take_lowest_priority()
        assert autogroup.write_text.mock_calls == len(answers) * [mock.call("19")]
    monkeypatch.setattr(queue, "take_lowest_priority", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        queue.train(None, None, None, quick=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number):
    with stop_signals() as stop:
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.asked)
    assert signal.getsignal(number) != stop.ask


def command(store, study, *options):
    """Run a study with the folders of the store, and data beside them."""
    folders = ["--state", store.state, "--results", store.results, "--data-dir", store.state.with_name("data")]
    return main(list(map(str, [study, *folders, *options])))


def record_of(store, name):
    """The record of a run that is finished or begun."""
    return store.record(SimpleNamespace(name=name))


def test_the_queue_can_be_stopped_and_started_again(tmp_path, capfd, store):
    write_packed(tmp_path / "data", 10, training=1500, tested=100)
    name, fails = "0-cifar10-vcl-rate0.1-seed0", "0-cifar10-bn-rate0.1-seed0"

    def press_ctrl_c():
        wait_until(lambda: record_of(store, name) and records.epochs_of(record_of(store, name)))
        for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            os.kill(process.pid, signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    assert command(store, "cifar", "--quick", "--runs", name, "--workers", 1) == 0
    thread.join()
    printed = capfd.readouterr().out
    done = records.epochs_of(record_of(store, name))
    assert all(text in printed for text in ("the same command continues", "hours left", f"{name}: epoch {done} of 6"))
    assert not store.results.exists()
    checkpoint = store.state / fails / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"cut off")
    assert command(store, "cifar", "--quick", "--runs", name, fails, "--workers", 2) == 2
    printed = capfd.readouterr().err
    assert f"{fails} failed" in printed
    assert f"{name} failed" not in printed
    assert f"{checkpoint} cannot be resumed; delete its folder" in printed
    found = record_of(store, name)
    assert (found["resumed_after_epochs"], records.epochs_of(found)) == ([done], 6)
    assert (found["images"]["training"], found["images"]["scored"]) == (1200, 300)
    assert command(store, "cifar", "--quick", "--runs", name, "--status") == 0
    assert f"{name}: epoch 6 of 6" in capfd.readouterr().out


def test_runs_that_fail_are_tried_once_and_named(tmp_path, monkeypatch, capsys, store):
    write_packed(tmp_path / "data", 10)
    context = mock.Mock()
    context.Process.return_value = mock.Mock(exitcode=1, **{"is_alive.return_value": False})
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    assert command(store, "cifar", "--quick", "--runs", "0-*-rate0.1-*", "--workers", 2) == 2
    assert context.Process.call_count == len(runs.BASE)
    names_said = ", ".join(f"0-cifar10-{method}-rate0.1-seed0" for method in runs.BASE)
    assert f"{names_said} failed" in capsys.readouterr().err


def test_what_keeps_a_queue_from_starting_is_said_before_any_worker(tmp_path, capsys, store):
    asked = (store, "cifar", "--quick", "--runs", "0-cifar10-bn-rate0.1*")
    assert command(*asked) == 2
    assert "data_batch_1 is missing" in capsys.readouterr().err
    write_packed(tmp_path / "data", 10)
    with only_one(store.state):
        assert command(*asked) == 2
    assert f"process {os.getpid()} is at work" in capsys.readouterr().err
    assert main(["cifar", "--quick", "--state", str(store.state)]) == 2
    assert "--data-dir" in capsys.readouterr().err
    assert not store.results.exists()


def test_no_worker_outlives_a_queue_that_ends_by_an_error(tmp_path, monkeypatch, store):
    write_packed(tmp_path / "data", 10, training=100)
    at_work = queue.Queue(agenda.Agenda(store, ["0-*-vcl-rate0.1-*"], quick=True), tmp_path / "data", 1, None)
    monkeypatch.setattr(at_work, "_follow", mock.Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError):
        at_work.work(Stop())
    ((_, process),) = at_work.workers.values()
    assert not process.is_alive()


@pytest.fixture
def turn(tmp_path, store):
    """The command of turns on one device, with tiny networks."""
    write_packed(tmp_path / "data", 10, training=40, tested=20)
    small = ("--k", "0.02", "--epochs", "3", "--device", "cpu")
    return lambda budget, seeds, *more: command(store, "cifar-gpu", *small, "--budget", budget, "--seeds", seeds, *more)


def of_turns(store, seed=0):
    """The records of a seed: epochs done, and those after which it was resumed."""
    found = [record_of(store, f"gpu-cifar10-{method}-seed{seed}") for method in runs.BASE]
    return [records.epochs_of(record) for record in found], [record["resumed_after_epochs"] for record in found]


def test_on_one_device_methods_take_turns_within_a_budget(monkeypatch, capsys, store, turn):
    took, epoch = [], training.Training.epoch
    monkeypatch.setattr(
        training.Training, "epoch", lambda self: (took.append((self.run.seed, self.run.method)), epoch(self))
    )
    assert turn(0.001, 1) == 0
    assert took == []
    assert turn(1000, 2) == 0
    assert took == [(seed, method) for seed in (0, 1) for _ in range(3) for method in runs.BASE]
    assert of_turns(store, seed=1)[0] == [3, 3, 3]
    assert turn(1000, 2) == 0
    assert len(took) == 18
    assert "gpu-cifar10-vcl-seed0: epoch 3 of 3" in capsys.readouterr().out
    assert turn(1000, 1, "--k", "0.03") == 2  # a record of other settings is not the run's
    assert "cannot be resumed" in capsys.readouterr().err


def test_a_budget_that_ends_or_an_error_leaves_what_continues(monkeypatch, store, turn):
    with monkeypatch.context() as patch:
        patch.setattr(turns, "monotonic", mock.Mock(side_effect=range(1000)))
        assert turn(16, 1) == 0
    done = of_turns(store)[0]
    assert 1 <= min(done) <= max(done) < 3
    epoch, calls = training.Training.epoch, []

    def failing(self):
        calls.append(self.run.method)
        if len(calls) == 2:
            raise RuntimeError("CUDA error")
        epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "epoch", failing)
        with pytest.raises(RuntimeError, match="CUDA error"):
            turn(1000, 1)
    after = of_turns(store)[0]
    assert sum(after) == sum(done) + 1
    assert turn(1000, 1) == 0
    epochs, resumed = of_turns(store)
    assert epochs == [3, 3, 3]
    assert [of[-1] for of, count in zip(resumed, after, strict=True) if count < 3] == [n for n in after if n < 3]


def test_a_rehearsal_has_folders_of_its_own():
    arguments = ["cifar-gpu", "--budget", "1", "--data-dir", "data"]
    real, rehearsal = parse(arguments), parse([*arguments, "--device", "cpu"])
    assert real.results == RESULTS / "cifar-gpu"
    assert RESULTS not in rehearsal.results.parents
    assert real.state != rehearsal.state
    assert RESULTS not in parse(["cifar", "--quick"]).results.parents


def test_finished_runs_are_those_of_the_plan_on_one_kind_of_cpu_for_a_seed():
    by_name = {run.name: run for run in runs.planned(files.Store(RESULTS / "cifar", RESULTS).rates())}
    machines = {}
    for path in (RESULTS / "cifar").glob("*.json"):
        record = json.loads(path.read_text())
        run = record["run"]
        assert run == asdict(by_name[path.stem])
        (epochs,) = {len(column) for column in record["epochs"].values()}
        assert record["diverged"] or epochs == run["epochs"]
        images = (45_000, 5_000) if run["stage"] == "0" else (50_000, 10_000)
        assert (record["images"]["training"], record["images"]["scored"]) == images
        assert record["machine"]["dtype"] in ("bfloat16", "float32")
        seed = run["dataset"], run["held_out"], run["seed"]
        assert machines.setdefault(seed, record["machine"]) == record["machine"]
    assert machines


def test_the_plan_has_the_learning_rates_that_stage_0_chose():
    tuned = [run for run in runs.planned({}) if run.stage == "0"]
    table = page.learning_rates(files.Store(RESULTS / "cifar", RESULTS), tuned)[2:]
    assert "\n".join(table).strip() in (Path(page.__file__).parents[1] / "PLAN.md").read_text()

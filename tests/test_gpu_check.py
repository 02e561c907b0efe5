"""The GPU check's stages: what becomes of those that fail, hang, lack something or find no time left."""

import json
import os
import signal
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from common import wait_until
from processes import ended

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.runner import Runner, Stage
from benchmarks.gpu.stages import ROOT, environment, stages


def stage(name, script="", least=0.0, limit=10.0, **more):
    return Stage(name, ["bash", "-c", script], least, limit, **more)


def run(chosen, out, budget=30.0, grace=0.3):
    return Runner(out, dict(os.environ), out, grace).run_all(chosen, budget, {"commit": "none"})


def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_results_logs_and_summary(tmp_path, capsys):
    results = run(
        [
            stage("good", "echo all is well"),
            stage("second", "grep -o '\"stage\": .*' summary.json"),
            stage("bad", "echo no luck; exit 3"),
            stage("lacking", "echo Device not supported here; exit 1", lacking="Device not supported[^\\n]*"),
            stage("absent", "echo never", unavailable="no such tool"),
            Stage("told", ["echo"], 0.0, 10.0, share=0.5),
            Stage("unstartable", [str(tmp_path / "nothing")], 0.0, 5.0),
        ],
        tmp_path,
    )
    statuses = ["passed", "passed", "failed", "not available", "not available", "passed", "failed"]
    assert [r.status for r in results] == statuses
    assert (tmp_path / "good.log").read_text() == "all is well\n"
    assert (tmp_path / "second.log").read_text() == '"stage": "good",\n'  # written after each stage
    assert (results[2].exit_code, results[2].tail) == (3, "no luck\n")
    assert [r.reason for r in results[3:5]] == ["Device not supported here", "no such tool"]
    assert results[5].tail == "5\n"  # half of the stage's ten seconds
    assert not (tmp_path / "absent.log").exists()
    assert "all is well" in capsys.readouterr().out
    assert (summary(tmp_path)["commit"], summary(tmp_path)["finished"]) == ("none", True)
    recorded = [(s["stage"], s["status"]) for s in summary(tmp_path)["stages"]]
    assert recorded == [(r.stage, r.status) for r in results]
    with tarfile.open(tmp_path / "results.tar.gz") as packed:
        assert {"summary.json", "good.log", "second.log"} <= set(packed.getnames())
    assert command.report(results, tmp_path) == 1
    assert command.report(results[4:6], tmp_path) == 0
    assert "absent: not available: no such tool" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "limit", "status"),
    [("trap '' INT; sleep 60 & echo $$ $!; wait", 1.0, "timed out"), ("sleep 60 & echo $!", 10.0, "passed")],
    ids=["past its limit", "what it leaves running"],
)
def test_at_the_end_of_a_stage_nothing_of_it_runs(tmp_path, script, limit, status):
    one, after = run([stage("one", script, limit=limit), stage("next")], tmp_path)
    assert (one.status, after.status) == (status, "passed")
    assert one.seconds < 4
    assert one.tail.split()
    wait_until(lambda: all(ended(int(pid)) for pid in one.tail.split()), 2)


def test_an_interrupted_stage_writes_what_it_knows(tmp_path):
    (one,) = run([stage("one", "trap 'echo so far; exit' INT; sleep 60 & wait", limit=1.0)], tmp_path, grace=5.0)
    assert (one.status, one.tail) == ("timed out", "so far\n")


def test_what_is_not_started_when_the_budget_is_spent_or_a_needed_stage_failed(tmp_path):
    long, later = run([stage("long", "sleep 60", limit=60.0), stage("later", least=4.0)], tmp_path, budget=5.0)
    assert (long.status, later.status) == ("timed out", "passed")  # later's least time was left for it
    last, short = run([stage("last", least=50.0), stage("short")], tmp_path, budget=12.4)
    assert (last.status, short.status) == ("not started", "passed")
    assert last.reason == "no time left: 12 s of 50 s"
    first, second = run([stage("first", "exit 1", needed=True), stage("second")], tmp_path)
    assert (first.status, second.status, second.reason) == ("failed", "not available", "first: failed")


def test_stopping_the_check_stops_the_stage(tmp_path, monkeypatch):
    """As by a machine's own time limit: SIGTERM to the check, whose stage must not run on."""
    log = tmp_path / "hangs.log"
    chosen = [stage("done"), stage("hangs", "echo $$; sleep 60")]
    monkeypatch.setattr(command, "stages", lambda *_: chosen)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])

    def terminate():
        wait_until(lambda: log.exists() and log.read_text().strip())
        os.kill(os.getpid(), signal.SIGTERM)

    thread, before = threading.Thread(target=terminate), signal.getsignal(signal.SIGTERM)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            command.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    thread.join()
    wait_until(lambda: ended(int(log.read_text())), 2)
    assert [s["stage"] for s in summary(tmp_path)["stages"]] == ["done"]
    assert not summary(tmp_path)["finished"]


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_stage_has_a_command_that_exists_and_time(tmp_path, monkeypatch, rehearse):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = stages(tmp_path, 240.0, rehearse)
    assert sum(s.least for s in found) < 240
    for s in found:
        assert s.least < s.limit
        assert all((ROOT / word).exists() for word in s.command if word.endswith(".py"))
        modules = [ROOT / word.replace(".", "/") for word in s.command if word.startswith("benchmarks.")]
        assert all(path.is_dir() or path.with_suffix(".py").exists() for path in modules)
        assert (s.command[-1] == "--budget") == (s.share == 0.85)
    env = environment(rehearse)
    assert env.get("TRITON_INTERPRET") == ("1" if rehearse else None)
    assert env["PYTHONPATH"].startswith(str(ROOT))


def test_a_rehearsal_builds_beside_the_checkout_and_compiles_kernels(tmp_path):
    real, rehearsed = ({s.name: s for s in stages(tmp_path, 480.0, rehearse)} for rehearse in (False, True))
    assert real["build"].command[-2:] == ["build_ext", "--inplace"]
    build = rehearsed["build"].command
    assert "build_ext" in build
    assert "--inplace" not in build
    folders = [Path(build[build.index(name) + 1]) for name in ("--build-lib", "--build-temp")]
    assert all(tmp_path in folder.parents for folder in folders)
    assert real["compile"].unavailable
    assert not rehearsed["compile"].unavailable
    assert {**environment(True), **rehearsed["compile"].environment}["TRITON_INTERPRET"] != "1"


@pytest.mark.parametrize(("option", "value"), [("--budget", "0"), ("--out", "a file")])
def test_a_wrong_argument_is_named(tmp_path, monkeypatch, capsys, option, value):
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", option, value])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 2
    assert f"{option} must be" in capsys.readouterr().err

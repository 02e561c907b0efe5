"""The GPU check's stages: what becomes of those that fail, hang, lack something or find no time left."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from common import wait_until
from processes import ended

from benchmarks.gpu.__main__ import main, report
from benchmarks.gpu.runner import Runner, Stage
from benchmarks.gpu.stages import ROOT, environment, stages

CHILD = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
SLEEP = "import time; time.sleep(60)"


def stage(name, code="", least=0.0, limit=10.0, **more):
    return Stage(name, [sys.executable, "-c", code], least, limit, **more)


def run(stages, out, budget=30.0, grace=1.0):
    return Runner(out, dict(os.environ), out, grace).run_all(stages, budget, {"commit": "none"})


def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_results_logs_and_summary(tmp_path, capsys):
    seen_by_second = (
        f"import json; print([s['stage'] for s in json.load(open({str(tmp_path / 'summary.json')!r}))['stages']])"
    )
    results = run(
        [
            stage("good", "print('all', 'is well')"),
            stage("second", seen_by_second),
            stage("bad", "import sys; print('no', 'luck'); sys.exit(3)"),
            stage("lacking", "print('Device not supported here'); exit(1)", lacking="Device not supported[^\\n]*"),
            stage("absent", "print('never')", unavailable="no such tool"),
            stage("told", "import sys; print(*sys.argv[1:])", share=0.5),
            Stage("unstartable", [str(tmp_path / "nothing")], 0.0, 5.0),
        ],
        tmp_path,
    )
    statuses = ["passed", "passed", "failed", "not available", "not available", "passed", "failed"]
    assert [r.status for r in results] == statuses
    assert (tmp_path / "good.log").read_text() == "all is well\n"
    assert (tmp_path / "second.log").read_text() == "['good']\n"  # written after each stage
    assert (results[2].exit_code, results[2].tail) == (3, "no luck\n")
    assert [r.reason for r in results[3:5]] == ["Device not supported here", "no such tool"]
    assert results[5].tail == "5\n"  # half of the stage's ten seconds
    assert not (tmp_path / "absent.log").exists()
    assert "all is well" in capsys.readouterr().out
    record = summary(tmp_path)
    assert (record["commit"], record["finished"]) == ("none", True)
    assert [(s["stage"], s["status"]) for s in record["stages"]] == [(r.stage, r.status) for r in results]
    with tarfile.open(tmp_path / "results.tar.gz") as packed:
        assert {"summary.json", "good.log", "second.log"} <= set(packed.getnames())
    assert report(results, tmp_path) == 1
    assert report(results[4:6], tmp_path) == 0
    assert "absent: not available: no such tool" in capsys.readouterr().out


def test_a_stage_past_its_limit_is_killed_whole(tmp_path):
    code = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + CHILD
    code += "print(os.getpid(), child.pid, flush=True)\ntime.sleep(60)"
    start = time.monotonic()
    results = run([stage("hangs", code, limit=1.0), stage("next")], tmp_path, grace=0.3)
    assert time.monotonic() - start < 5
    assert [r.status for r in results] == ["timed out", "passed"]
    pids = results[0].tail.split()
    assert len(pids) == 2
    wait_until(lambda: all(ended(int(pid)) for pid in pids), 2)


@pytest.mark.parametrize(
    ("code", "status", "tail"),
    [
        ("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far')", "timed out", "so far\n"),
        (CHILD + "print(child.pid)", "passed", None),
    ],
    ids=["interrupted, it writes what it knows", "what it leaves running is ended"],
)
def test_the_end_of_a_stage(tmp_path, code, status, tail):
    (result,) = run([stage("one", code, limit=2.0)], tmp_path, grace=5.0)
    assert result.status == status
    if tail is None:
        wait_until(lambda: ended(int(result.tail)), 2)
    else:
        assert result.tail == tail


def test_what_is_not_started_when_the_budget_is_spent_or_a_needed_stage_failed(tmp_path):
    start = time.monotonic()
    results = run([stage("long", SLEEP, limit=60.0), stage("later", least=4.0)], tmp_path, budget=6.5, grace=0.5)
    assert time.monotonic() - start < 6.5
    assert [r.status for r in results] == ["timed out", "passed"]  # later's least time was left for it
    results = run([stage("last", least=50.0), stage("short")], tmp_path, budget=12.5, grace=0.5)
    assert [r.status for r in results] == ["not started", "passed"]
    assert results[0].reason == "no time left: 12 s of 50 s"
    results = run([stage("first", "exit(1)", needed=True), stage("second")], tmp_path)
    assert [r.status for r in results] == ["failed", "not available"]
    assert results[1].reason == "first: failed"


def test_stopping_the_check_stops_the_stage(tmp_path):
    """As by a machine's own time limit: SIGTERM to the check, whose stage must not run on."""
    code = f"""
import signal
from pathlib import Path
from test_gpu_check import stage, run
signal.signal(signal.SIGTERM, signal.default_int_handler)
hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
run([stage("done"), stage("hangs", hangs)], Path({str(tmp_path)!r}))
"""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    log = tmp_path / "hangs.log"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folders}, stderr=-3) as check:
        wait_until(lambda: log.exists() and log.read_text().strip())
        check.terminate()
        assert check.wait(10) != 0
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
        modules = [word for word in s.command if word.startswith("benchmarks.")]
        assert all(
            (ROOT / m.replace(".", "/")).is_dir() or (ROOT / f"{m.replace('.', '/')}.py").exists() for m in modules
        )
        assert (s.command[-1] == "--budget") == (s.share == 0.85)
    env = environment(rehearse)
    assert env.get("TRITON_INTERPRET") == ("1" if rehearse else None)
    assert env["PYTHONPATH"].startswith(str(ROOT))


def test_a_rehearsal_builds_beside_the_checkout_and_compiles_kernels(tmp_path):
    real, rehearsed = ({s.name: s for s in stages(tmp_path, 480.0, rehearse)} for rehearse in (False, True))
    assert real["build"].command[-2:] == ["build_ext", "--inplace"]
    command = rehearsed["build"].command
    assert "build_ext" in command
    assert "--inplace" not in command
    folders = [Path(command[command.index(name) + 1]) for name in ("--build-lib", "--build-temp")]
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
        main()
    assert exit_.value.code == 2
    assert f"{option} must be" in capsys.readouterr().err

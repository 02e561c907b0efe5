"""The GPU check's stages: what becomes of those that fail, hang, lack something or find no time left."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check.__main__ import report
from benchmarks.gpu_check.runner import Stage, run_all
from benchmarks.gpu_check.stages import ROOT, environment, stages

CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"


def stage(name, code="", least=0.0, limit=10.0, **more):
    return Stage(name, lambda seconds: [sys.executable, "-c", code], least, limit, **more)


def run(stages, out, budget=30.0, grace=1.0):
    return run_all(stages, budget, out, folder=out, environment=dict(os.environ), about={"commit": "none"}, grace=grace)


def summary(out):
    return json.loads((out / "summary.json").read_text())


def ended(pid):
    """Whether soon no process has the number, or a dead one whose parent has not asked yet."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


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
            Stage("unstartable", lambda seconds: [str(tmp_path / "nothing")], 0.0, 5.0),
        ],
        tmp_path,
    )
    statuses = ["passed", "passed", "failed", "not available", "not available", "failed"]
    assert [r.status for r in results] == statuses
    assert (tmp_path / "good.log").read_text() == "all is well\n"
    assert (tmp_path / "second.log").read_text() == "['good']\n"  # written after each stage
    assert results[2].exit_code == 3
    assert results[2].tail == "no luck\n"
    assert results[3].reason == "Device not supported here"
    assert results[4].reason == "no such tool"
    assert not (tmp_path / "absent.log").exists()
    assert "all is well" in capsys.readouterr().out
    record = summary(tmp_path)
    assert (record["commit"], record["finished"]) == ("none", True)
    with tarfile.open(tmp_path / "results.tar.gz") as packed:
        assert {"summary.json", "good.log", "second.log"} <= set(packed.getnames())
    assert [(s["stage"], s["status"]) for s in record["stages"]] == [(r.stage, r.status) for r in results]


def test_a_stage_past_its_limit_is_killed_whole(tmp_path):
    code = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + CHILD.replace(
        "subprocess.Popen", "child = subprocess.Popen"
    )
    code += "\nprint(os.getpid(), child.pid, flush=True)\ntime.sleep(60)"
    start = time.monotonic()
    results = run([stage("hangs", code, limit=1.0), stage("next")], tmp_path, grace=0.3)
    assert time.monotonic() - start < 5
    assert [r.status for r in results] == ["timed out", "passed"]
    pids = results[0].tail.split()
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


def test_an_interrupted_stage_writes_what_it_knows(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far')"
    (result,) = run([stage("slow", code, limit=5.0)], tmp_path, grace=5.0)
    assert (result.status, result.tail) == ("timed out", "so far\n")


def test_what_a_stage_leaves_running_is_ended(tmp_path):
    code = CHILD.replace("subprocess.Popen", "child = subprocess.Popen") + "\nprint(child.pid)"
    (result,) = run([stage("leaves", code)], tmp_path)
    assert result.status == "passed"
    assert ended(result.tail.strip())


def test_a_budget_that_is_spent(tmp_path):
    sleeping = "import time; time.sleep(60)"
    stages = [stage("long", sleeping, limit=60.0), stage("later", least=5.0), stage("last", least=50.0)]
    start = time.monotonic()
    results = run(stages[:2], tmp_path, budget=12.5, grace=0.5)
    assert time.monotonic() - start < 12.5
    assert [r.status for r in results] == ["timed out", "passed"]  # later's least time was kept for it
    results = run([stages[2], stage("short")], tmp_path, budget=12.5, grace=0.5)
    assert [r.status for r in results] == ["not started", "passed"]
    assert results[0].reason == "no time left: 12 s of 50 s"


def test_nothing_follows_a_needed_stage_that_failed(tmp_path):
    results = run([stage("first", "exit(1)", needed=True), stage("second")], tmp_path)
    assert [r.status for r in results] == ["failed", "not available"]
    assert results[1].reason == "first: failed"


@pytest.mark.parametrize(("code", "expected"), [("", 0), ("exit(2)", 1)])
def test_exit_code(tmp_path, capsys, code, expected):
    results = run([stage("one", code), stage("two", unavailable="none here")], tmp_path)
    assert report(results, tmp_path) == expected
    assert "two: not available: none here" in capsys.readouterr().out


def test_stopping_the_check_stops_the_stage(tmp_path):
    """As by a machine's own time limit: SIGTERM to the check, whose stage must not run on."""
    code = f"""
import os, signal, sys
from pathlib import Path
from test_gpu_check import stage, run
signal.signal(signal.SIGTERM, signal.default_int_handler)
hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
run([stage("done"), stage("hangs", hangs)], Path({str(tmp_path)!r}))
"""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    check = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folders}, stderr=-3)
    log = tmp_path / "hangs.log"
    until = time.monotonic() + 20
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < until:
        time.sleep(0.05)
    check.terminate()
    assert check.wait(10) != 0
    assert ended(log.read_text().strip())
    assert [s["stage"] for s in summary(tmp_path)["stages"]] == ["done"]
    assert not summary(tmp_path)["finished"]


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_stage_has_a_command_that_exists_and_time(tmp_path, monkeypatch, rehearse):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = stages(tmp_path, 240.0, rehearse)
    assert sum(s.least for s in found) < 240
    for s in found:
        command = s.command(100.0)
        assert s.least < s.limit
        files = [ROOT / word for word in command if word.endswith(".py")]
        assert all(file.exists() for file in files)
        assert "--budget" not in command or command[command.index("--budget") + 1] == "85"
    env = environment(rehearse)
    assert env.get("TRITON_INTERPRET") == ("1" if rehearse else None)
    assert env["PYTHONPATH"].startswith(str(ROOT))


def test_a_rehearsal_builds_beside_the_checkout_and_compiles_kernels(tmp_path):
    real, rehearsed = ({s.name: s for s in stages(tmp_path, 480.0, rehearse)} for rehearse in (False, True))
    assert real["build"].command(90.0)[-2:] == ["build_ext", "--inplace"]
    command = rehearsed["build"].command(90.0)
    assert "build_ext" in command
    assert "--inplace" not in command
    folders = [Path(command[command.index(name) + 1]) for name in ("--build-lib", "--build-temp")]
    assert all(tmp_path in folder.parents for folder in folders)
    assert real["compile"].unavailable
    assert not rehearsed["compile"].unavailable
    assert {**environment(True), **rehearsed["compile"].environment}["TRITON_INTERPRET"] != "1"


def test_wrong_arguments_are_named(tmp_path):
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--budget", "0"], "--budget must be"),
        (["--out", str(tmp_path / "file")], "--out must"),
    ):
        command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr

"""Stages run one after another within a budget of seconds, each with a process group and a log of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

GRACE = 15.0  # seconds that an interrupted stage has to write what it knows, before it is killed
TAIL = 4000  # characters of output that the summary keeps
POLL = 0.1

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NOT_STARTED, NOT_AVAILABLE = "not started", "not available"


def heed_interruptions() -> None:
    """In a stage, before it begins: a background shell has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Stage(NamedTuple):
    """A command, made when the seconds that it gets are known.

    ``least`` is the time below which it is not started; the stages before it leave that much, if they can.
    ``limit`` is the most that it gets.
    """

    name: str
    command: Callable[[float], list[str]]
    least: float
    limit: float
    unavailable: str = ""  # why it cannot run here
    needed: bool = False  # by all that follow
    environment: Mapping[str, str] = MappingProxyType({})
    lacking: str = ""  # a failure whose output has this pattern says that the machine lacks something


class Result(NamedTuple):
    """What became of a stage."""

    stage: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    tail: str = ""


def run_all(
    stages: Sequence[Stage],
    budget: float,
    out: Path,
    *,
    folder: Path,
    environment: dict[str, str],
    about: dict[str, Any],
    grace: float = GRACE,
) -> list[Result]:
    """Run ``stages`` in ``folder``; after each, write ``out/summary.json``: ``about``, and every result so far."""
    start = time.monotonic()
    results: list[Result] = []
    missing = ""
    for index, stage in enumerate(stages):
        wanted_later = sum(later.least for later in stages[index + 1 :] if not later.unavailable)
        left = budget - (time.monotonic() - start) - grace
        kept = wanted_later + grace if wanted_later else 0.0
        seconds = min(stage.limit, max(stage.least, left - kept))
        if stage.unavailable or missing:
            result = Result(stage.name, NOT_AVAILABLE, stage.unavailable or missing)
        elif left < stage.least:
            result = Result(stage.name, NOT_STARTED, f"no time left: {max(0.0, left):.0f} s of {stage.least:.0f} s")
        else:
            print(f"== {stage.name}: at most {seconds:.0f} s of the {left:.0f} s left", flush=True)
            env = {**environment, **stage.environment}
            result = _run(stage, seconds, out / f"{stage.name}.log", folder, env, grace)
        if stage.needed and result.status != PASSED:
            missing = f"{stage.name}: {result.status}"
        results.append(result)
        print(f"== {described(result)}", flush=True)
        record = {**about, "finished": index + 1 == len(stages), "seconds": round(time.monotonic() - start, 1)}
        _write(out / "summary.json", {**record, "stages": [r._asdict() for r in results]})
        _pack(out)
    return results


def described(result: Result) -> str:
    """Return a line on a result."""
    reason = f": {result.reason}" if result.reason else ""
    return f"{result.stage}: {result.status}{reason} ({result.seconds:.1f} s)"


def _run(stage: Stage, seconds: float, log: Path, folder: Path, environment: dict[str, str], grace: float) -> Result:
    start = time.monotonic()
    with log.open("wb") as output, log.open(encoding="utf-8", errors="replace") as shown:
        try:
            process = subprocess.Popen(
                stage.command(seconds),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
                preexec_fn=heed_interruptions,
            )
        except OSError as error:
            return Result(stage.name, FAILED, f"not startable: {error}")
        try:
            in_time = _follow(process, shown, start + seconds)
            if not in_time:
                _signal(process, signal.SIGINT)
                _follow(process, shown, time.monotonic() + grace)
        finally:
            _signal(process, signal.SIGKILL)  # and whatever the command left running
            code = _waited(process)
        _show(shown)
    taken = round(time.monotonic() - start, 1)
    text = log.read_text(encoding="utf-8", errors="replace")
    status, reason = (PASSED, "") if code == 0 else (FAILED, f"exit code {code}")
    lacking = re.search(stage.lacking, text) if stage.lacking and code else None
    if not in_time:
        status, reason = TIMED_OUT, f"stopped after {seconds:.0f} s"
    elif lacking:
        status, reason = NOT_AVAILABLE, lacking[0]
    return Result(stage.name, status, reason, taken, code, text[-TAIL:])


def _waited(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code; None if even a kill does not end it (a process that waits inside a driver)."""
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return None


def _follow(process: subprocess.Popen[bytes], shown: TextIO, until: float) -> bool:
    """Print what the process writes; return whether it ended before ``until``."""
    while process.poll() is None:
        if time.monotonic() >= until:
            return False
        _show(shown)
        time.sleep(POLL)
    return True


def _show(shown: TextIO) -> None:
    print(shown.read(), end="", flush=True)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of its processes have ended
        os.killpg(process.pid, number)


def _pack(out: Path) -> None:
    """Put every file of ``out`` into one, ``results.tar.gz``, for machines that hand back only a few."""
    partial = out / "results.partial"
    with tarfile.open(partial, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path.is_file() and path.suffix != ".partial" and path.name != "results.tar.gz":
                archive.add(path, path.name)
    partial.replace(out / "results.tar.gz")


def _write(path: Path, record: dict[str, Any]) -> None:
    """Replace the file at once, so that whoever stops this finds a whole one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO

GRACE = 15.0  # seconds that an interrupted stage has to write what it knows, before it is killed
TAIL = 4000  # characters of output that the summary keeps
POLL = 0.1

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NOT_STARTED, NOT_AVAILABLE = "not started", "not available"


class Stage(NamedTuple):
    """A command, and the seconds that it gets: ``limit`` at most, and it is not started with fewer than ``least``.

    The stages before it leave that much, if they can.
    """

    name: str
    command: list[str]
    least: float
    limit: float
    unavailable: str = ""  # why it cannot run here
    needed: bool = False  # by all that follow
    environment: Mapping[str, str] = MappingProxyType({})
    lacking: str = ""  # a pattern in the output of a failure which says that the machine lacks something
    share: float = 0.0  # of its seconds, appended to the command: what the command is to plan with


class Result(NamedTuple):
    """What became of a stage."""

    stage: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    tail: str = ""

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.stage}: {self.status}{reason} ({self.seconds:.1f} s)"


class Runner(NamedTuple):
    """Where stages run: the working folder, their environment, the folder of logs, seconds to end when interrupted."""

    folder: Path
    environment: dict[str, str]
    out: Path
    grace: float = GRACE

    def run_all(self, stages: Sequence[Stage], budget: float, about: dict[str, Any]) -> list[Result]:
        """Run ``stages``; after each, write ``summary.json``: ``about``, and every result so far."""
        start = time.monotonic()
        results: list[Result] = []
        missing = ""
        for index, stage in enumerate(stages):
            wanted_later = sum(later.least for later in stages[index + 1 :] if not later.unavailable)
            left = budget - (time.monotonic() - start) - self.grace
            reserved = wanted_later + self.grace if wanted_later else 0.0
            if stage.unavailable or missing:
                result = Result(stage.name, NOT_AVAILABLE, stage.unavailable or missing)
            elif left < stage.least:
                result = Result(stage.name, NOT_STARTED, f"no time left: {max(0.0, left):.0f} s of {stage.least:.0f} s")
            else:
                seconds = min(stage.limit, max(stage.least, left - reserved))
                print(f"== {stage.name}: at most {seconds:.0f} s of the {left:.0f} s left", flush=True)
                result = self.run(stage, seconds)
            if stage.needed and result.status != PASSED:
                missing = f"{stage.name}: {result.status}"
            results.append(result)
            print(f"== {result}", flush=True)
            record = {**about, "finished": index + 1 == len(stages), "seconds": round(time.monotonic() - start, 1)}
            self._write({**record, "stages": [r._asdict() for r in results]})
        return results

    def run(self, stage: Stage, seconds: float) -> Result:
        start = time.monotonic()
        log = self.out / f"{stage.name}.log"
        with log.open("wb") as output, log.open(encoding="utf-8", errors="replace") as shown:
            try:
                process = subprocess.Popen(
                    [*stage.command, *([f"{stage.share * seconds:.0f}"] if stage.share else [])],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    env={**self.environment, **stage.environment},
                    start_new_session=True,
                    preexec_fn=heed_interruptions,
                )
            except OSError as error:
                return Result(stage.name, FAILED, f"not startable: {error}")
            try:
                in_time = _follow(process, shown, start + seconds)
                if not in_time:
                    _signal(process, signal.SIGINT)
                    _follow(process, shown, time.monotonic() + self.grace)
            finally:
                _signal(process, signal.SIGKILL)  # and whatever the command left running
                code = None  # stays so for a process that waits inside a driver: even a kill does not end it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=10)
            print(shown.read(), end="", flush=True)
        text = log.read_text(encoding="utf-8", errors="replace")
        status, reason = (PASSED, "") if code == 0 else (FAILED, f"exit code {code}")
        lacking = re.search(stage.lacking, text) if stage.lacking and code else None
        if not in_time:
            status, reason = TIMED_OUT, f"stopped after {seconds:.0f} s"
        elif lacking:
            status, reason = NOT_AVAILABLE, lacking[0]
        return Result(stage.name, status, reason, round(time.monotonic() - start, 1), code, text[-TAIL:])

    def _write(self, record: dict[str, Any]) -> None:
        """Write ``summary.json``, and every file into one for machines that hand back few; each replaced as a whole."""
        partial = self.out / "partial"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(self.out / "summary.json")
        with tarfile.open(partial, "w:gz") as archive:
            for path in sorted(self.out.iterdir()):
                if path.is_file() and path.name not in ("partial", "results.tar.gz"):
                    archive.add(path, path.name)
        partial.replace(self.out / "results.tar.gz")


def heed_interruptions() -> None:
    """Run in a stage before it begins: the children of a background shell ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _follow(process: subprocess.Popen[bytes], shown: TextIO, until: float) -> bool:
    """Print what the process writes; return whether it ended before ``until``."""
    while process.poll() is None:
        if time.monotonic() >= until:
            return False
        print(shown.read(), end="", flush=True)
        time.sleep(POLL)
    return True


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of its processes have ended
        os.killpg(process.pid, number)

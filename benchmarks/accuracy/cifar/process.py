"""What a long command needs: the lowest priority, a flag that signals set, a lock on its folder, lines for a log."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ..errors import DataError

LOWEST_PRIORITY = 19
AUTOGROUP = Path("/proc/self/autogroup")


class Stop:
    """A flag. (A threading.Event has a lock that a signal handler could find taken by its own thread.)"""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: object) -> None:
        self.asked = True


def take_lowest_priority() -> None:
    """Leave the processors to every other process.

    Where Linux shares them between sessions (autogroup), ``nice`` acts within a session only. So the process moves to
    a session of its own, whose priority is then the lowest; that of the shell stays as it is.
    """
    os.nice(LOWEST_PRIORITY)
    if not AUTOGROUP.exists():
        return
    os.setsid()
    for _ in range(50):
        try:
            AUTOGROUP.write_text(str(LOWEST_PRIORITY))
            return
        except BlockingIOError:  # Linux accepts one change every 0.1 s, of all processes together
            time.sleep(0.1)
        except OSError:
            return


def say(console: Console, line: str) -> None:
    """Print a line as it is, without breaks or colours."""
    console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Give a flag that SIGINT and SIGTERM set."""
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop.ask) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second command out of ``folder``.

    Raises:
        DataError: one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(f"process {file.read().strip()} is at work in {folder}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

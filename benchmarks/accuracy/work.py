"""Units of work, done once: each finished one is a line of a JSONL file, and a rerun continues after the last."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.demo.work import be_a_worker

Record = dict[str, Any]


def load(path: Path) -> list[Record]:
    """Return each finished unit and what was found; a last line that was cut off is not one."""
    if not path.exists():
        return []
    *lines, rest = path.read_text().split("\n")
    if rest:
        path.write_text("".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]


def do(
    units: Sequence[Record],
    work: Callable[[Record], Record],
    path: Path,
    console: Console,
    *,
    processes: int = 1,
    minutes: float | None = None,
) -> list[Record]:
    """Do every unit that ``path`` has not; return the records of all that are done, in the order of ``units``.

    Args:
        units: what ``work`` is given; plain values. A record is a unit with what work found.
        processes: at work at a time, each with one thread; 1: in this process.
        minutes: no unit begins after that; what is left is printed, and waits for a rerun.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {key(line["unit"]): line["found"] for line in load(path)}
    left = [unit for unit in units if key(unit) not in done]
    until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    with progress(console, len(left)) as advance, path.open("a") as file:
        for unit, result in finished(left, work, processes, until):
            done[key(unit)] = result
            file.write(json.dumps({"unit": unit, "found": result}) + "\n")
            file.flush()
            advance(" ".join(str(value) for value in unit.values()))
    missing = sum(key(unit) not in done for unit in units)
    if missing:
        console.print(f"{path}: {missing} of {len(units)} units are left; the same command continues")
    return [{**unit, **done[key(unit)]} for unit in units if key(unit) in done]


def key(unit: Record) -> str:
    return json.dumps(unit, sort_keys=True)


def finished(
    units: Sequence[Record], work: Callable[[Record], Record], processes: int, until: float
) -> Iterator[tuple[Record, Record]]:
    """Yield each unit with its result, as they come."""
    waiting = (unit for unit in units if time.monotonic() < until)
    if processes == 1:
        for unit in waiting:
            yield unit, work(unit)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=be_a_worker) as pool:
        running = {pool.submit(work, unit): unit for unit in islice(waiting, 2 * processes)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                running.update({pool.submit(work, unit): unit for unit in islice(waiting, 1)})


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Give a function that counts a finished unit, on a terminal by a bar."""
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("units,")
    with Progress(*columns, TimeRemainingColumn(compact=True), TextColumn("left"), console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda doing: bar.update(task, advance=1, description=doing)

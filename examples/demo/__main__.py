"""Train, measure, print the table, write the picture and the record.

docs/demo.png and benchmarks/results/accuracy/demo.json are what it wrote with the settings in that file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from . import record, work
from .data import SOURCES
from .learning import METHODS, MODES
from .measure import saved_bytes, step_times
from .options import parse
from .picture import draw
from .progress import Bars
from .schedule import Schedule, methods_of
from .summary import Results, summarise, table
from .training import Plan, Task

RESERVE = 10.0  # seconds of the time for the steps that are timed and the picture


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    start = time.monotonic()
    options, console = parse(argv), Console()
    plan = planned(options)
    until = start + 60 * options.minutes - RESERVE
    on_cpu = torch.device(plan.device).type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    runs = compare(plan, options.splits, options.threads if on_cpu else 1, until, console)
    costs = cost(plan, options.timed_rounds)
    results: Results = {method: {"runs": runs[method], **costs[method]} for method in METHODS}
    summary = summarise(results)
    seconds = time.monotonic() - start
    found = {
        "settings": {name: value for name, value in vars(options).items() if name not in ("out", "threads")},
        "modes": {**plan.vcl, **MODES},
        "threads": options.threads,
        "versions": record.versions(),
        "machine": record.machine(torch.device(plan.device)),
        "data": {"train": plan.images, "test": SOURCES[plan.dataset] - plan.images},
        "tested_after": plan.tested(),
        "seconds": seconds,
        "summary": summary,
        "methods": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    drawing, written = options.out / "demo.png", options.out / "demo.json"
    record.write(found, written)
    draw(found, written, drawing)
    console.print(table(summary["rows"], title(found)))
    for sentence in summary["sentences"]:
        console.print(sentence, highlight=False, soft_wrap=True)
    print(f"{seconds:.0f} s; wrote {drawing} and {written}")


def planned(options: argparse.Namespace) -> Plan:
    """Return what all trainings share."""
    shared = ("dataset", "images", "epochs", "batch_size", "learning_rate", "weight_decay", "device")
    vcl = {name: getattr(options, name) for name in ("weight", "unit", "sub_batch_size", "form")}
    return Plan(**{name: getattr(options, name) for name in shared}, vcl=vcl)


def title(found: dict[str, Any]) -> str:
    settings, data = found["settings"], found["data"]
    images = f"{data['train']:,} training and {data['test']:,} test images"
    return f"{settings['dataset']}: {images}, batches of {settings['batch_size']}, {settings['epochs']} epochs"


def compare(
    plan: Plan, splits: int | None, processes: int, until: float, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Train every method on as many splits as fit; return the trainings of each method, in the order of splits."""
    schedule = Schedule(splits, processes)
    found: dict[Task, dict[str, Any]] = {}
    bars = Bars(console, plan.epochs)
    with bars.progress:
        for task, result in work.trained(tasks(plan, schedule, until), processes, bars.tell):
            found[task] = result
            schedule.seconds.append(result["seconds"])
            bars.end(task, result, schedule.trainings(until - time.monotonic()))
    ordered = sorted(found, key=lambda task: task.split)
    return {method: [found[task] for task in ordered if task.method == method] for method in METHODS}


def tasks(plan: Plan, schedule: Schedule, until: float) -> Iterator[Task]:
    """Give the trainings of split after split, while the schedule has one begin."""
    while schedule.begins(until - time.monotonic()):
        split = schedule.begun
        schedule.begun += 1
        for method in methods_of(split):
            yield Task(plan, method, split)


def cost(plan: Plan, rounds: int) -> Results:
    """Return milliseconds of training steps, the methods taking turns, and bytes saved for backward."""
    learners = {method: plan.learner(method, 0) for method in METHODS}
    data = plan.data(0)
    x, y = data.train_x[: plan.batch_size].clone(), data.train_y[: plan.batch_size].clone()  # not kept by the whole set
    times = step_times(learners, x, y, rounds)
    return {
        method: times[method]
        | {"saved_bytes": saved_bytes(partial(learner.objective, x, y), learner.model.parameters())}
        for method, learner in learners.items()
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

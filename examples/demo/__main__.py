"""Train, measure, print the table, write the picture and the record."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import record
from .learning import THIRD_ELU, Data, Settings, build, load
from .measure import histogram, pre_activations, saved_bytes, step_times
from .picture import METHODS, draw

SHOWN = 1000  # test images whose pre-activations go into the histogram


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo")
    parser.description = "Train a small ELU network with no normalisation, batch norm and VCL, and compare."
    add = parser.add_argument
    add("--dataset", choices=("mnist5k", "digits"), default="mnist5k")
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    add("--seeds", type=positive_int, help="runs of each method (3)")
    add("--epochs", type=positive_int, help="(10)")
    add("--batch-size", type=positive_int, default=100)
    add("--learning-rate", type=float, default=0.05)
    add("--weight-decay", type=float, default=5e-4)
    add("--weight", type=float, default=0.01, help="of the VCL (%(default)s)")
    add("--sub-batch-size", type=positive_int, default=5, help="samples in a sub-batch of the VCL (%(default)s)")
    add("--form", choices=("ratio", "variance", "relative_variance"), default="ratio")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--threads", type=positive_int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder of demo.png and demo.json (%(default)s)")
    add("--validate", action="store_true", help="score on a fifth of the training set, to choose settings by")
    add("--quick", action="store_true", help="one seed, two epochs, 500 images: a check that everything runs")
    options = parser.parse_args(argv)
    if "vcl" in options.methods and options.batch_size < 2 * options.sub_batch_size:
        parser.error(f"--batch-size {options.batch_size} has no two sub-batches of {options.sub_batch_size}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    options.methods = [method for method in METHODS if method in options.methods]
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.epochs = options.epochs or (2 if options.quick else 10)
    options.limit = 500 if options.quick else None  # training images
    options.timed_rounds = 5 if options.quick else 60
    return options


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants 1 or more, got {text}")
    return int(text)


def compare(options: argparse.Namespace, data: Data, console: Console) -> dict[str, dict[str, Any]]:
    """Return, for each method: learning curves, pre-activations, step times and memory."""
    size = min(options.batch_size, len(data.train_x))
    steps, o = options.epochs * (len(data.train_x) // size), options
    settings = Settings(steps, o.learning_rate, o.weight_decay, o.weight, o.sub_batch_size, o.form)
    results: dict[str, dict[str, Any]] = {method: {"train_loss": [], "test_accuracy": []} for method in options.methods}
    runs = [(seed, method) for seed in range(options.seeds) for method in options.methods]
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(runs) * options.epochs)
        for seed, method in runs:
            learner, name = build(method, data.train_x[:1], seed, settings), f"{METHODS[method]}, seed {seed}"
            order = torch.Generator().manual_seed(seed)
            losses, accuracies = [], []
            for _ in range(options.epochs):
                losses.append(learner.epoch(data.train_x, data.train_y, size, order))
                accuracies.append(learner.accuracy(data.test_x, data.test_y))
                bar.update(task, advance=1, description=name)
            results[method]["train_loss"].append(losses)
            results[method]["test_accuracy"].append(accuracies)
            console.print(f"{name}: accuracy {100 * accuracies[-1]:.2f} %", highlight=False)
            if seed == 0:
                seen = pre_activations(learner.model, learner.model.get_submodule(THIRD_ELU), data.test_x[:SHOWN])
                results[method]["pre_activations"] = histogram(seen)

    x, y = data.train_x[:size].clone(), data.train_y[:size].clone()  # clones: not kept alive by the whole set
    fresh = {method: build(method, x[:1], 0, settings) for method in options.methods}
    times = step_times(fresh, x, y, options.timed_rounds)
    for method, learner in fresh.items():
        saved = saved_bytes(partial(learner.objective, x, y), learner.model.parameters())
        results[method] |= times[method] | {"saved_bytes": saved}
    return results


def table(results: dict[str, dict[str, Any]], title: str, scored_on: str) -> Table:
    """Return one row for each method."""
    found = Table("method", title=title, title_justify="left", title_style="bold")
    for heading in (f"{scored_on} accuracy, %", "step, ms", "saved for backward, MB"):
        found.add_column(heading, justify="right")
    for method, result in results.items():
        final = [100 * curve[-1] for curve in result["test_accuracy"]]
        spread = f" ± {statistics.stdev(final):.2f}" if len(final) > 1 else ""
        costs = f"{result['median_step_ms']:.2f}", f"{result['saved_bytes'] / 1e6:.2f}"
        found.add_row(METHODS[method], f"{statistics.mean(final):.2f}{spread}", *costs)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    data = load(options.dataset, validate=options.validate, limit=options.limit, device=device)
    console = Console()
    start = time.perf_counter()
    results = compare(options, data, console)
    seconds = time.perf_counter() - start
    scored_on = "validation" if options.validate else "test"
    title = f"{options.dataset}: {len(data.train_x):,} training images, {len(data.test_x):,} {scored_on} images"
    options.out.mkdir(parents=True, exist_ok=True)
    drawing, written = options.out / "demo.png", options.out / "demo.json"
    draw(results, title, scored_on, drawing)
    found = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "versions": record.versions(),
        "machine": record.machine(device),
        "data": {"train": len(data.train_x), scored_on: len(data.test_x), "image": list(data.train_x.shape[1:])},
        "seconds": seconds,
        "methods": results,
    }
    record.write(found, written)
    console.print(table(results, title, scored_on))
    print(f"{seconds:.0f} s; wrote {drawing} and {written}")


if __name__ == "__main__":
    main()

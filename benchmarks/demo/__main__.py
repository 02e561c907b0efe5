"""Train, measure, print the table, write the picture and the record."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import data as datasets
from . import measure, picture, report
from .data import Data
from .errors import DataError
from .learner import METHODS, Learner
from .options import Options, parse
from .training import train


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    console = Console()
    try:
        data = datasets.load(
            options.dataset, options.data_dir, validate=options.validate, limit=options.limit, device=device
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    results = run_all(options, data, console)
    seconds = time.perf_counter() - start

    options.out.mkdir(parents=True, exist_ok=True)
    files = options.out / "demo.png", options.out / "demo.json"
    scored_on = "validation" if options.validate else "test"
    title = f"{options.dataset}: {len(data.train_x):,} training images, {len(data.test_x):,} {scored_on} images"
    picture.draw(results, title, scored_on, files[0])
    record = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "versions": report.versions(),
        "machine": report.machine(device),
        "data": {"train": len(data.train_x), scored_on: len(data.test_x), "image": list(data.train_x.shape[1:])},
        "seconds": seconds,
        "methods": results,
    }
    report.write(record, files[1])
    console.print(report.table(results, title, scored_on))
    print(f"{seconds:.0f} s; wrote {files[0]} and {files[1]}")
    return 0


def run_all(options: Options, data: Data, console: Console) -> dict[str, dict[str, Any]]:
    """Return, for each method, learning curves, costs and the histogram of the first seed's pre-activations."""
    size = min(options.batch_size, len(data.train_x))
    steps = options.epochs * (len(data.train_x) // size)

    def learner(method: str, seed: int) -> Learner:
        return Learner(
            method,
            data.train_x[:1],
            data.classes,
            seed=seed,
            steps=steps,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            weight=options.weight,
            sub_batch_size=options.sub_batch_size,
            form=options.form,
        )

    results: dict[str, dict[str, Any]] = {m: {"train_loss": [], "test_accuracy": []} for m in options.methods}
    with report.progress(console, len(options.methods) * options.seeds * options.epochs) as advance:
        for seed in range(options.seeds):
            for method in options.methods:
                learnt = learner(method, seed)
                name = f"{METHODS[method]}, seed {seed}"
                run = train(
                    learnt, data, epochs=options.epochs, batch_size=size, seed=seed, after=lambda: advance(name, "")
                )
                results[method]["train_loss"].append(run.train_loss)
                results[method]["test_accuracy"].append(run.test_accuracy)
                if seed == 0:
                    results[method]["pre_activations"] = measure.histogram(
                        measure.pre_activations(learnt.model, learnt.middle(), data.test_x[:1000])
                    )

    x, y = data.train_x[:size].clone(), data.train_y[:size].clone()
    fresh = {method: learner(method, 0) for method in options.methods}
    for method, times in measure.step_times(fresh, x, y, options.timed_rounds).items():
        one = fresh[method]
        results[method]["step_ms"] = times
        results[method]["median_step_ms"] = float(torch.tensor(times).median())
        results[method]["saved_bytes"] = measure.saved_bytes(one.model, lambda one=one: one.objective(x, y))
    return results


if __name__ == "__main__":
    sys.exit(main())

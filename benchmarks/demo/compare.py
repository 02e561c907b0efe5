"""All methods on one data set: learning curves, pre-activations, step times and memory."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from . import measure
from .data import Data
from .learner import METHODS, Learner, demo_learner, middle
from .options import Options
from .report import progress
from .training import Run, train

SHOWN = 1000  # test images whose pre-activations go into the histogram


def compare(options: Options, data: Data, console: Console) -> dict[str, dict[str, Any]]:
    """Return, for each method, what the JSON file has of it."""
    size = min(options.batch_size, len(data.train_x))

    def learner(method: str, seed: int) -> Learner:
        return demo_learner(
            method,
            data.train_x[:1],
            data.classes,
            seed=seed,
            steps=options.epochs * (len(data.train_x) // size),
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            weight=options.weight,
            sub_batch_size=options.sub_batch_size,
            form=options.form,
        )

    results: dict[str, dict[str, Any]] = {method: {"train_loss": [], "test_accuracy": []} for method in options.methods}
    with progress(console, len(options.methods) * options.seeds * options.epochs) as advance:

        def learn(method: str, seed: int) -> None:
            def after(run: Run) -> None:
                name = f"{METHODS[method]}, seed {seed}"
                finished = len(run.test_accuracy) == options.epochs
                advance(name, f"{name}: accuracy {100 * run.test_accuracy[-1]:.2f} %" if finished else "")

            learnt, result = learner(method, seed), results[method]
            run = train(learnt, data, epochs=options.epochs, batch_size=size, seed=seed, after=after)
            result["train_loss"].append(run.train_loss)
            result["test_accuracy"].append(run.test_accuracy)
            if seed == 0:
                seen = measure.pre_activations(learnt.model, middle(learnt.model), data.test_x[:SHOWN])
                result["pre_activations"] = measure.histogram(seen)

        for seed in range(options.seeds):
            for method in options.methods:
                learn(method, seed)

    x, y = data.train_x[:size].clone(), data.train_y[:size].clone()  # clones: not kept alive by the whole set
    fresh = {method: learner(method, 0) for method in options.methods}
    times = measure.step_times(fresh, x, y, options.timed_rounds)
    for method, one in fresh.items():
        results[method] |= measure.summary(times[method]) | {"saved_bytes": measure.saved_bytes(one, x, y)}
    return results

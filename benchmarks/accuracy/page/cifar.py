"""The section of the CIFAR study: what its plan has led to so far."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..cifar.files import Store
from ..cifar.runs import BASE, LEARNING_RATES, METHODS, Run, planned
from .markdown import SHOWN, table

PLAN = "../benchmarks/accuracy/PLAN.md"  # from the page
COMMAND = "python -m benchmarks.accuracy cifar --data-dir FOLDER"
STAGES = {
    "0": "CIFAR-10, learning rates",
    "1": "CIFAR-10, the three methods",
    "1b": "CIFAR-10, variants",
    "2": "CIFAR-100, the three methods",
}


def section(folder: Path) -> list[str]:
    """Return how many runs are finished, and what stage 0 has chosen; nothing is compared before its stage is whole."""
    store = Store(folder / "cifar", folder)
    runs = list(planned(store.rates()))
    finished = [run for run in runs if store.finished(run)]
    if not finished:
        return ["## CIFAR", "", f"Not measured yet: `{COMMAND}` does what [the plan]({PLAN}) says.", ""]
    all_, done = Counter(run.stage for run in runs), Counter(run.stage for run in finished)
    return [
        "## CIFAR",
        "",
        f"The paper's network and the authors' recipe, by [a plan]({PLAN}) that was written before the first run. "
        f"`{COMMAND}` makes [a file for each run]({SHOWN}/cifar). Finished so far, and compared when a stage is whole:",
        "",
        *table(
            ["stage", "", "runs finished"],
            [[stage, what, f"{done[stage]} of {all_[stage]}"] for stage, what in STAGES.items()],
        ),
        *learning_rates(store, runs),
    ]


def learning_rates(store: Store, runs: list[Run]) -> list[str]:
    """Return the table of stage 0, which the plan has too."""
    tuned = {(run.method, run.learning_rate): run for run in runs if run.stage == "0"}
    rates, chosen = sorted(LEARNING_RATES), store.rates()
    lines = []
    for method in BASE:
        cells = [error(store, tuned[method, rate]) for rate in rates]
        lines.append([METHODS[method].label, *cells, str(chosen.get(method, "not yet"))])
    return [
        "Error on 5,000 training images held back, after 20 epochs at each learning rate (one seed):",
        "",
        *table(["method", *(f"{rate}, %" for rate in rates), "chosen"], lines),
    ]


def error(store: Store, run: Run) -> str:
    record = store.record(run) if store.finished(run) else None
    return "" if record is None else f"{record['epochs']['test_error'][-1]:.2f}"

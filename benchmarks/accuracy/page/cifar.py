"""The section of the CIFAR study: what its plan has led to so far."""

from __future__ import annotations

from pathlib import Path

from ..cifar.files import Store
from ..cifar.records import score
from ..cifar.runs import BASE, HELD_OUT, LEARNING_RATES, METHODS, Run, planned
from .markdown import SHOWN, table

PLAN = "../benchmarks/accuracy/PLAN.md"  # from the page
COMMAND = "python -m benchmarks.accuracy cifar --data-dir FOLDER"


def section(folder: Path) -> list[str]:
    """Return what the stages that are whole have found; of the others nothing, not even how far they are."""
    store = Store(folder / "cifar", folder)
    tuned = [run for run in planned({}) if run.stage == "0"]
    found = learning_rates(store, tuned) if all(store.finished(run) for run in tuned) else []
    return [
        "## CIFAR",
        "",
        "The paper's network at a quarter of its width with the authors' recipe over 60 epochs, by "
        f"[a plan]({PLAN}) that was written before the first run. `{COMMAND}` makes a file for each run. The results "
        "of a stage stand here once all its runs are finished.",
        "",
        *(found or [f"Not measured yet: `{COMMAND}`.", ""]),
    ]


def learning_rates(store: Store, runs: list[Run]) -> list[str]:
    """Return what stage 0 found; the plan has the same table."""
    tuned = {(run.method, run.learning_rate): run for run in runs}
    rates, chosen = sorted(LEARNING_RATES), store.rates()
    lines = []
    for method in BASE:
        cells = [error(store, tuned[method, rate]) for rate in rates]
        lines.append([METHODS[method].label, *cells, str(chosen[method])])
    return [
        f"Learning rates: error on {HELD_OUT:,} training images held back, after 20 epochs, one seed "
        f"([files]({SHOWN}/cifar)).",
        "",
        *table(["method", *(f"{rate}, %" for rate in rates), "chosen"], lines),
    ]


def error(store: Store, run: Run) -> str:
    """Return the error after the last epoch."""
    record = store.record(run)
    assert record is not None
    return "diverged" if record["diverged"] else f"{score(record)[0]:.2f}"

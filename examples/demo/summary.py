"""What is said of the trainings: a row for each method, and sentences."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from .comparison import Difference, paired, sentence
from .learning import METHODS

Results = dict[str, dict[str, Any]]  # of each method; each list of "runs" in the order of splits


def summarise(results: Results) -> dict[str, Any]:
    """Return, for each method, means over splits and differences from no normalisation, and what is decided.

    A method that was trained on the first splits only is compared on these.
    """
    rows = {method: row(result["runs"], results["none"]["runs"]) for method, result in results.items()}
    for method, result in results.items():
        rows[method] |= {name: result[name] for name in ("median_step_ms", "saved_bytes")}
    sentences = [
        sentence(METHODS["vcl"], METHODS[other], *differences(results["vcl"]["runs"], results[other]["runs"]))
        for other in ("none", "bn")
    ]
    return {"rows": rows, "sentences": sentences}


def row(runs: list[dict[str, Any]], none: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a method's means over its splits, and its differences from no normalisation."""
    error, nll = differences(runs, none)
    return {
        "splits": len(runs),
        "test_error": statistics.mean(final(runs, "test_error")),
        "test_nll": statistics.mean(final(runs, "test_nll")),
        "error_difference": error._asdict(),
        "nll_difference": nll._asdict(),
        "kurtosis": statistics.mean(statistics.median(run["kurtosis"]) for run in runs),
        "least_kurtosis": statistics.mean(min(run["kurtosis"]) for run in runs),
    }


def differences(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[Difference, Difference]:
    """Return the paired differences in test error and negative log-likelihood, over the splits that both have."""
    splits = min(len(runs), len(others))
    error, nll = (paired(final(runs[:splits], of), final(others[:splits], of)) for of in ("test_error", "test_nll"))
    return error, nll


def final(runs: list[dict[str, Any]], of: str) -> list[float]:
    """Return the values at the end of training."""
    return [run[of][-1] for run in runs]


def table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """Return one row for each method, within 80 columns."""
    found = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=0)
    found.add_column("method", no_wrap=True)
    for heading in ("error %", "difference", "nll", "difference", "step ms", "saved kB"):
        found.add_column(heading, justify="right", no_wrap=True)
    for method, of in rows.items():
        error, nll = Difference(**of["error_difference"]), Difference(**of["nll_difference"])
        first = method == "none"
        found.add_row(
            METHODS[method],
            f"{of['test_error']:.2f}",
            "" if first else error.shown(2),
            f"{of['test_nll']:.3f}",
            "" if first else nll.shown(3),
            f"{of['median_step_ms']:.2f}",
            f"{of['saved_bytes'] / 1e3:.0f}",
        )
    splits = ", ".join(f"{METHODS[method]} {of['splits']}" for method, of in rows.items())
    found.caption = (
        f"Means over splits ({splits}). difference: paired, from no normalisation, with half of its 95 % interval "
        "(Student's t). nll: negative log-likelihood. saved: for backward."
    )
    found.caption_justify = "left"
    return found

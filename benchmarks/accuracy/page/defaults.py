"""The section of the study of defaults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from .. import results
from ..defaults.choice import best_runs, screen_scores
from ..defaults.decision import Judged, Judgement, decide, judge, passes, score
from ..defaults.settings import AFTERWARDS, BATCH_NORM, NONE, Setting
from ..defaults.tasks import SCREENED
from .markdown import linked, made, none_yet, table

TITLE = "Default settings"
COMMAND = "defaults --processes 2 --seeds 5"
SHOWN = 12  # of the settings that were screened
NAMED = {
    "demo": "five ELU convolutions, 1,000 MNIST images, batch 20",
    "resnet-elu": "8-layer ResNet, ELU, 2,000 images, batch 50",
    "resnet-relu": "8-layer ResNet, ReLU, 2,000 images, batch 50",
    "elu-11": "the paper's network, quarter width, 2,000 images, batch 50",
    "tables": "four ELU layers of 64, 12 UCI and KEEL sets, batch 64",
}


def section(folder: Path) -> list[str]:
    """Return the section."""
    screened, records = results.read("defaults-screen", folder), results.read("defaults", folder)
    if not records:
        return none_yet(TITLE, f"python -m benchmarks.accuracy {COMMAND}")
    judged, networks = judge(records), list(dict.fromkeys(record["network"] for record in records))
    later = [*records, *results.read("defaults-after", folder)]
    text = (
        "Which settings `vk.attach` should have was decided by [a plan](../benchmarks/accuracy/PLAN-defaults.md), "
        f"written before the runs. {made(COMMAND, 'defaults')} Machine time ended after the first five seeds of eight."
    )
    tables = [*_compared(judge(later), networks), *_acting(judge(later), networks)]
    tables += [*_afterwards(judge(later, AFTERWARDS), networks), *_screened(screened)]
    return [f"## {TITLE}", "", text, "", _decision(judged), "", *tables]


def summary(folder: Path) -> list[str]:
    """Return the table of the README: the default of attach, and batch norm, beside no normalisation."""
    judged = judge([*results.read("defaults", folder), *results.read("defaults-after", folder)])
    (default,) = AFTERWARDS
    rows = []
    for network, name in NAMED.items():
        pairs = [judged[setting][network] for setting in (default, BATCH_NORM)]
        rows.append([name, *(cell for j in pairs for cell in (_error(j), f"{j.nll_ratio - 1:+.0%}"))])
    columns = ("test error, points", "nll")
    return table(["network", *(f"{name}: {c}" for name in ("VCL", "batch norm") for c in columns)], rows)[:-1]


def _error(j: Judged) -> str:
    return f"{-j.error.gain:+.2f} ± {j.error.half:.2f}"


def _decision(judged: dict[Setting, Judgement]) -> str:
    chosen = decide(judged)
    if chosen is None:
        return "No setting passed the rule: none acts everywhere, harms nowhere and gains somewhere."
    return f"The choice by the rule: **{chosen}**. Its β is fixed in the default of attach, which was tried afterwards."


def _compared(judged: dict[Setting, Judgement], networks: list[str]) -> list[str]:
    rows = []
    for setting, judgement in sorted(judged.items(), key=lambda item: score(item[1])):
        verdict = "" if setting.vcl is None else "yes" if passes(judgement) else "no"
        cells = map(_differences, _on(judgement, networks))
        rows.append([str(setting), *cells, f"{math.expm1(score(judgement)):+.0%}", verdict])
    text = (
        "Test error, difference from no normalisation in points, paired by seed; then the negative log-likelihood "
        "relative to that without normalisation (below 0: better). \\*: better after correction. †: harm by the rule. "
        "The gradients of the task and of VCL were clipped at norm 1 each, then added."
    )
    return [text, "", *table(["method", *networks, "likelihood, mean", "passes"], rows)]


def _differences(j: Judged) -> str:
    marks = " \\*" * j.gains + " †" * j.harms
    return f"{_error(j)}; {j.nll_ratio - 1:+.0%}{marks}"


def _acting(judged: dict[Setting, Judgement], networks: list[str]) -> list[str]:
    rows = [[str(setting), *map(_action, _on(judgement, networks))] for setting, judgement in judged.items()]
    text = (
        "What VCL does to the layers: the share whose variance is within a factor of two of the one that β asks for "
        "(without VCL); then the relative variance of sub-batch variances, median over layers, relative to no "
        "normalisation."
    )
    return [text, "", *table(["method", *networks], rows)]


def _action(j: Judged) -> str:
    acts = "" if j.acts else " (no)"
    return f"{j.at_target:.0%} ({j.at_target_without:.0%}); {j.constancy_ratio:.2f}{acts}"


def _on(judgement: Judgement, networks: list[str]) -> Iterator[Judged]:
    return (judgement[network] for network in networks)


def _afterwards(after: dict[Setting, Judgement], networks: list[str]) -> list[str]:
    if not after:
        return []
    rows = [[str(s), *(_beside(j) for j in _on(judgement, networks))] for s, judgement in after.items()]
    text = (
        "Tried after phase 2, beside the same with a learned β, which moved by less than 4 %: error, difference "
        "in points; negative log-likelihood, ratio. Runs of elu-11 differ by points after the least change. "
        f"{made(COMMAND, 'defaults-after')}"
    )
    return [text, "", *table(["method", *networks], rows)]


def _beside(j: Judged) -> str:
    return f"{_error(j)}; {j.nll_ratio:.2f}"


def _screened(records: list[results.Record]) -> list[str]:
    scores, best = screen_scores(records), best_runs(records)
    kept = sorted((s for s, score in scores.items() if score is not None), key=lambda s: scores[s] or 0.0)
    networks = [network for network in SCREENED if (NONE, network, "") in best]
    rows = []
    for setting in [*kept[:SHOWN], *([NONE] if NONE not in kept[:SHOWN] else [])]:
        cells = [f"{run['error']:.2f}; {run['nll']:.3f}" for n in networks for run in [best[setting, n, ""]]]
        rows.append([str(setting), *cells, f"{scores[setting]:+.3f}"])
    text = (
        f"The best {SHOWN} of {len(scores)} methods in phase 1, on validation images of one seed, each at the better "
        f"of two learning rates: error in per cent; negative log-likelihood ({linked('defaults-screen')})."
    )
    return [text, "", *table(["method", *networks, "score"], rows)]

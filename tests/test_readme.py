"""The README's numbers are those of the committed results, and its code runs."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from PIL.PngImagePlugin import PngImageFile
from torch import nn

import vcl_kernels as vk
from benchmarks.speed.plots import digest
from benchmarks.speed.report import SHOWN, ratios, render

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
README, FINDINGS = (ROOT / "README.md").read_text(), (ROOT / "docs/findings.md").read_text()
RECORDS = [p for p in RESULTS.rglob("*.json") if p.stem in ("loss", "activation", "launch", "networks")]


@pytest.mark.parametrize("suite", ["loss", "activation", "networks"])
def test_tables_come_from_the_results(suite):
    record = json.loads((RESULTS / f"cpu-epyc/{suite}.json").read_text())
    assert ratios(record, SHOWN) in README


def test_errors_are_those_of_the_findings():
    (advice,) = re.findall(r"\*\*Does it help\?\*\*(.*?)\n## ", README, re.DOTALL)
    findings = FINDINGS
    differences = re.findall(r"[+-]\d+\.\d\d ± \d+\.\d\d", advice)
    errors = re.findall(r"\d+\.\d\d", re.sub("|".join(map(re.escape, differences)), "", advice))
    assert differences
    assert errors
    assert [difference for difference in differences if f"| {difference}, " not in findings] == []
    assert [error for error in errors if f"| {error} ± " not in findings] == []


def test_verdicts_are_counted_as_in_the_findings():
    (sentence,) = re.findall(r"^Of \d+ comparisons .* too few seeds", FINDINGS, re.MULTILINE)
    assert sentence in " ".join(README.split())


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_reports_are_what_their_records_say(record):
    assert record.with_suffix(".md").read_text() == render(json.loads(record.read_text()))


def test_the_picture_is_made_from_the_results():
    with PngImageFile(ROOT / "docs/speed.png") as picture:
        assert picture.info["Source"] == digest(RESULTS / "cpu-epyc")


def test_the_readmes_code_runs():
    use, equal = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    images, labels = torch.randn(20, 3, 8, 8), torch.randint(10, (20,))
    names = {"model": model, "images": images, "labels": labels, "example_input": images[:1]}
    names |= {"criterion": nn.CrossEntropyLoss(), "beta": 0.7}
    ours, inject = use.rsplit("\nvk.attach", 1)
    exec(ours, names)
    names["objective"].backward()
    assert names["loss"].shape == ()
    names["handle"].remove()  # the last line is the other way
    exec("handle = vk.attach" + inject, names)
    assert [m.inject for m in model.modules() if isinstance(m, vk.VCLActivation)] == [True]
    exec(equal, names)
    torch.testing.assert_close(names["loss"], vk.vcl_loss(names["x"], names["beta"]))


MODULES = [module.name for module in pkgutil.walk_packages(vk.__path__, "vcl_kernels.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("._C", ".__main__"))])
def test_examples_of_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0

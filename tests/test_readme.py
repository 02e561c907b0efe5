"""The README's numbers are those of the committed results, and its code runs."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from libraries import library
from PIL.PngImagePlugin import PngImageFile
from torch import nn

import vcl_kernels as vk
from benchmarks.accuracy.page import defaults
from benchmarks.speed.plots import digest
from benchmarks.speed.report import SHOWN, ratios, render
from examples.demo import picture as demo_picture
from vcl_kernels.nn.rows import COLUMNS

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
    assert [d for d in differences if f"| {d}, " not in findings and f"| {d}; " not in findings] == []
    assert [error for error in errors if f"| {error} ± " not in findings] == []


def test_verdicts_are_counted_as_in_the_findings():
    (sentence,) = re.findall(r"^Of \d+ comparisons .* too few seeds", FINDINGS, re.MULTILINE)
    assert sentence in " ".join(README.split())


def test_the_table_of_the_defaults_is_rendered():
    assert "\n".join(defaults.summary(RESULTS / "accuracy")) in README


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_reports_are_what_their_records_say(record):
    assert record.with_suffix(".md").read_text() == render(json.loads(record.read_text()))


def test_the_pictures_are_made_from_the_results():
    with PngImageFile(ROOT / "docs/speed.png") as picture:
        assert picture.info["Source"] == digest(RESULTS / "cpu-epyc")
    with PngImageFile(ROOT / "docs/demo.png") as picture:
        assert picture.info["Source"] == demo_picture.digest(RESULTS / "accuracy/demo.json")


def test_the_readmes_code_runs():
    use, inject, trainers, equal = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    images, labels = torch.randn(20, 3, 8, 8), torch.randint(10, (20,))
    names = {"model": model, "images": images, "labels": labels, "example_input": images[:1]}
    names |= {"criterion": nn.CrossEntropyLoss(), "beta": 0.7}
    exec(use, names)
    names["objective"].backward()
    assert names["loss"].shape == ()
    names["handle"].remove()
    exec(inject, names)
    assert [m.inject for m in model.modules() if isinstance(m, vk.VCLActivation)] == [True]
    for client in ("accelerate", "lightning", "transformers"):
        library(client)
    exec(trainers, names)
    exec(equal, names)
    torch.testing.assert_close(names["loss"], vk.vcl_loss(names["x"], names["beta"]))


def test_the_code_of_the_integrations_page_runs(tmp_path):
    page = (ROOT / "docs/integrations.md").read_text()
    for_lightning, for_transformers, for_accelerate, schedule = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    lightning, transformers, accelerate = map(library, ("lightning", "transformers", "accelerate"))
    names = {"Trainer": lambda callbacks: lightning.Trainer(callbacks=callbacks, logger=False, accelerator="cpu")}
    exec(for_lightning, names)
    assert any(type(callback).__name__ == "VCLCallback" for callback in names["trainer"].callbacks)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    names |= {"model": nn.Sequential(nn.Linear(4, 8), nn.ELU()), "args": arguments}
    exec(for_transformers, names | {"data": [{"input": torch.randn(4), "labels": 0}] * 2})
    exec(for_accelerate, names := names | {"accelerator": accelerate.Accelerator(cpu=True), "example_input": None})
    exec(schedule, names := names | {"step": 250})
    assert names["handle"].weight == pytest.approx(0.005)


OF_THE_MONITOR = ("monitor.py", "recorder.py", "report.py")


@pytest.mark.parametrize("page", ["attach", "monitor"])
def test_the_guides_have_each_warning(page):
    """Each text in a guide's table is in one of the code that it is about, and each kind of warning has a row."""
    files = [p for p in (ROOT / "vcl_kernels/nn").glob("*.py") if (p.name in OF_THE_MONITOR) == (page == "monitor")]
    trees = [ast.parse(path.read_text()) for path in files]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and is_warning(node)]
    parts = [getattr(call.args[1], "values", call.args[1:]) for call in calls]  # of an f-string, or the whole
    texts = ["".join(part.value for part in p if isinstance(part, ast.Constant)) for p in parts]
    table = (ROOT / f"docs/{page}.md").read_text().split("| it says |")[1]
    phrases = [phrase.replace("\\", "") for phrase in re.findall(r"^\| \*(.*?)\* \|", table, re.MULTILINE)]
    assert len(phrases) >= 5
    assert {text for text in texts if not any(phrase in text for phrase in phrases)} == set()
    assert [phrase for phrase in phrases if not any(phrase in text for text in texts)] == []


def test_the_monitors_guide_has_each_column():
    table = (ROOT / "docs/monitor.md").read_text().split("| column |")[1].split("\n\n")[0]
    named = [
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    ]
    assert tuple(named) == COLUMNS


def is_warning(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name in ("warn", "tell") and len(call.args) == 2 and isinstance(call.args[0], ast.Constant)


MODULES = [module.name for module in pkgutil.walk_packages(vk.__path__, "vcl_kernels.")]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("._C", ".__main__"))])
def test_examples_of_docstrings_run(name):
    package, _, client = name.rpartition(".")
    if package == "vcl_kernels.integrations" and client in ("accelerate", "lightning", "transformers"):
        library(client)
    assert doctest.testmod(importlib.import_module(name)).failed == 0

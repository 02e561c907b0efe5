"""The README's numbers are those of the committed results, and its code runs."""

import json
from pathlib import Path

import pytest
import torch

import vcl_kernels as vk
from benchmarks.table import table

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("suite", ["loss", "activation"])
def test_tables_come_from_the_results(suite):
    record = json.loads((ROOT / f"benchmarks/results/cpu-avx512/vcl_{suite}.json").read_text())
    assert table(record) in (ROOT / "README.md").read_text()


def test_what_it_equals():
    torch.manual_seed(0)
    x, beta = torch.randn(12, 6, 4, 5), 0.7
    va, vb = x[0:5].var((0, 2, 3)), x[5:10].var((0, 2, 3))
    torch.testing.assert_close(vk.vcl_loss(x, beta), (1 - va / (vb + beta)).square().mean())

"""The README's numbers are those of the committed results, and its code runs."""

from pathlib import Path

import torch

import vcl_kernels as vk

ROOT = Path(__file__).parent.parent


def test_table_comes_from_the_results():
    import sys

    sys.path.insert(0, str(ROOT))
    from benchmarks.table import table

    assert table(ROOT / "benchmarks/results/cpu-avx512/vcl_loss.json") in (ROOT / "README.md").read_text()


def test_what_it_equals():
    torch.manual_seed(0)
    x, beta = torch.randn(12, 6, 4, 5), 0.7
    va, vb = x[0:5].var((0, 2, 3)), x[5:10].var((0, 2, 3))
    torch.testing.assert_close(vk.vcl_loss(x, beta), (1 - va / (vb + beta)).square().mean())

"""Two processes, each with its own batches, make the step of one that has all: Lightning, accelerate, transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from libraries import library

TESTS = Path(__file__).parent
CLIENTS = ("lightning", "accelerate", "transformers")


def test_a_step_of_two_processes_is_that_by_hand(monkeypatch):
    for client in CLIENTS:
        library(client)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}:{TESTS}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, TESTS / "two_processes.py"], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert [line for line in run.stdout.splitlines() if line.endswith("is that by hand")] == [
        f"{client}_step is that by hand" for client in CLIENTS
    ]

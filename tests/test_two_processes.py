"""Two processes, each with its own batches, make the step of one that has all; the example of torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from libraries import library

TESTS = Path(__file__).parent
CLIENTS = ("lightning", "accelerate", "transformers")
STEPS = ("lightning", "lightning_fsdp", "accelerate", "transformers")


def test_steps_of_two_processes_are_those_by_hand(monkeypatch):
    for client in CLIENTS:
        library(client)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}:{TESTS}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, TESTS / "two_processes.py"], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("test error") == 3  # of the example: an epoch, from one of the processes
    assert [line for line in run.stdout.splitlines() if line.endswith("is that by hand")] == [
        f"{client}_step is that by hand" for client in STEPS
    ]

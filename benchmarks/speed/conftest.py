"""Options of the suites, their contests as pytest-benchmark entries, and what a record says of the machine."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .race import Contest, Outcome


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="tiny sizes, Triton's interpreter on a CPU")
    parser.addoption("--budget", type=float, default=0.0, help="seconds after which no contest begins (no limit)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("rehearse"):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "measure" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=lambda: still_clock[0], disable_gc=False))


still_clock = [0.0]  # the sum of the times handed to it


def advance(seconds: float) -> None:
    still_clock[0] += seconds


@pytest.fixture(scope="session")
def outcome(request: pytest.FixtureRequest) -> Callable[[Contest], Outcome]:
    """Race each contest once, as long as time is left; only the latest outcome is kept."""
    budget = request.config.getoption("budget")
    end = time.monotonic() + (budget or float("inf"))
    latest: list[tuple[Contest, Outcome]] = []

    def of(contest: Contest) -> Outcome:
        if not latest or latest[0][0] is not contest:
            latest.clear()
            gc.collect()
            if "torch._dynamo" in sys.modules:  # importing it takes seconds
                torch.compiler.reset()
            if time.monotonic() >= end:
                request.session.shouldstop = "no time left"
                pytest.skip("no time left")
            selected = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function)]
            chosen = [str(params["candidate"]) for params in selected if params["contest"] is contest]
            latest.append((contest, contest.run(dict.fromkeys(chosen))))
        return latest[0][1]

    return of


@pytest.fixture
def measure(
    contest: Contest, candidate: str, phase: str, outcome: Callable[[Contest], Outcome], benchmark: Any
) -> Callable[[], None]:
    """Hand the candidate's times to pytest-benchmark."""

    def play() -> None:
        found = outcome(contest)
        if candidate in found.errors:
            raise found.errors[candidate]
        benchmark.group = f"{contest.name}, {phase}"
        benchmark.extra_info.update(
            {"case": contest.name, **contest.info, "candidate": candidate, "phase": phase}
            | ({"floor_bytes": floor} if (floor := contest.floor(candidate, phase)) else {})
            | ({"held_bytes": found.memory[candidate]} if phase == "both" and candidate in found.memory else {})
        )
        samples = found.samples[candidate][phase]
        times = itertools.cycle(samples)
        benchmark.pedantic(advance, setup=lambda: ((next(times),), {}), rounds=len(samples))

    return play


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    cuda, triton = torch.cuda.is_available(), importlib.metadata.distributions(name="triton")
    machine_info["vcl"] = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": next((found.version for found in triton), None),
        "vcl_kernels": importlib.import_module("vcl_kernels").__version__,
        "threads": torch.get_num_threads(),
        "keeping_allocator": "MALLOC_TRIM_THRESHOLD_" in os.environ,
        "cpu": (machine_info.get("cpu") or {}).get("brand_raw", "unknown"),
    }

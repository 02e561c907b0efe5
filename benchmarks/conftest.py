"""Options of the benchmarks, and what their record says of the machine."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import vcl_kernels as vk

from .suites import SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=SUITES, default="loss")
    parser.addoption("--rehearse", action="store_true", help="tiny sizes, Triton's interpreter")
    parser.addoption("--budget", type=float, default=0.0, help="seconds after which no contest begins")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu") or {}
    machine_info.clear()
    machine_info.update(machine(), cpu=cpu.get("brand_raw", "unknown"))


def machine() -> dict[str, Any]:
    """Return what may matter for speed: device, versions, threads, allocator."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "vcl_kernels": vk.__version__,
        "threads": torch.get_num_threads(),
        "keeping_allocator": "MALLOC_TRIM_THRESHOLD_" in os.environ,
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep what the report reads, and every sample, rounded to five digits."""
    output_json["suite"] = config.getoption("suite")
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "dirty")}
    for entry in output_json["benchmarks"]:
        stats = entry["stats"]
        kept = {key: float(f"{stats[key]:.5g}") for key in ("median", "q1", "q3")}
        samples = [float(f"{seconds:.5g}") for seconds in stats.get("data", ())]
        info = entry["extra_info"]
        entry.clear()
        entry.update(info, **kept, seconds=samples)

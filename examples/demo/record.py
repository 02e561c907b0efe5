"""What a record says of versions and machine, and how it is written as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

import vcl_kernels as vk


def versions() -> dict[str, str]:
    """Return what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class is none that torch.load(weights_only=True) takes
        "vcl_kernels": vk.__version__,
        **{name: importlib.metadata.version(name) for name in ("numpy", "matplotlib")},
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the times depend on."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"system": platform.system(), "architecture": platform.machine(), "accelerator": accelerator}


def write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(strict(record), indent=1, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """Return ``value`` with None for what JSON has no number for: a loss that diverged."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

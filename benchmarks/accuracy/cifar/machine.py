"""What a run was made on: results of one seed are compared within one kind of CPU and one dtype."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

INFO = Path("/proc/cpuinfo")
# What Linux says of a processor that tells its kind, on x86-64 and on Arm, and the word for it
IDENTITY = {
    "model name": "",
    "cpu family": "family",
    "model": "model",
    "CPU implementer": "implementer",
    "CPU part": "part",
}
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # instructions, as Linux names them on x86-64 and Arm


def _processor() -> dict[str, str]:
    """Return what Linux says of the first processor; elsewhere nothing."""
    try:
        first = INFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def kind(device: torch.device) -> str:
    """Return the model of the CPU, or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    said = _processor()
    known = [f"{word} {said[name]}".lstrip() for name, word in IDENTITY.items() if name in said]
    return ", ".join(known) or platform.processor() or platform.machine()


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return what a record says of the machine, for a training in ``dtype``."""
    return {"kind": kind(device), "dtype": str(dtype).removeprefix("torch.")}


def dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where there are instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    said = _processor()
    present = set(f"{said.get('flags', '')} {said.get('Features', '')}".split())
    return torch.bfloat16 if present & BFLOAT16 else torch.float32

"""Whether Triton can run here, asked without importing it."""

from __future__ import annotations

import importlib.util
import os

import torch


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Found once: it is asked for in every call, also by torch.compile, which cannot trace a search for packages.
_INSTALLED = importlib.util.find_spec("triton") is not None


def reason_not_installed() -> str | None:
    """Return what is missing, or None."""
    return None if _INSTALLED else "triton is not installed; `pip install triton` (Linux) brings it"


def reason() -> str | None:
    """Return why the backend cannot run, or None if it can."""
    missing = reason_not_installed()
    if missing is None and not interpreting() and not torch.cuda.is_available():
        return "no CUDA or ROCm device is visible to torch; TRITON_INTERPRET=1 runs the kernels on CPU tensors"
    return missing

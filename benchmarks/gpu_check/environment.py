"""What the machine has, and whether a kernel runs on it: the first stage, without which the others mean nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys

import torch

import vcl_kernels as vk
from vcl_kernels.__main__ import main as describe

PACKAGES = ("triton", "numpy", "setuptools", "ninja", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis")
MORE = ("matplotlib", "onnx", "onnxscript", "rich", "scikit-learn")
TOOLS = (
    ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
    ("nvcc", "--version"),
    ("g++", "--version"),
    ("compute-sanitizer", "--version"),
    ("ninja", "--version"),
)


def main() -> int:
    print(f"Python {platform.python_version()} at {sys.executable}; vcl_kernels at {os.path.dirname(vk.__file__)}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}, {os.cpu_count()} CPUs")
    for package in (*PACKAGES, *MORE):
        print(f"{package}: {_version(package)}")
    for tool in TOOLS:
        print(f"{tool[0]}: {_answer(*tool)}")
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB, L2 {getattr(p, 'L2_cache_size', 0) / 2**20:.0f} MiB"
        print(f"{p.name}: capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, {memory}")
    describe()
    rehearsing = "--rehearse" in sys.argv[1:]
    state = vk.backends()["triton"]
    if state != "available":
        print(f"the triton backend cannot run: {state}")
        return 1
    if not rehearsing and not torch.cuda.is_available():
        print("torch sees no CUDA device; --rehearse runs the stages without one")
        return 1
    one_step("cpu" if rehearsing else "cuda")
    return 0


def one_step(device: str) -> None:
    """Loss and gradient once, so that a machine on which Triton cannot compile is found at once."""
    x = torch.randn(20, 8, 6, 6, device=device, requires_grad=True)
    loss = vk.vcl_loss(x, form="variance", backend="triton")
    loss.backward()
    torch.testing.assert_close(loss, vk.reference.vcl_loss(x, form="variance"))
    print(f"a kernel ran on {x.device}: loss {loss.item():.6f}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _answer(*command: str) -> str:
    """The first line with a version in it."""
    if shutil.which(command[0]) is None:
        return "not installed"
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (run.stdout + run.stderr).splitlines()
    return next((line for line in lines if re.search(r"\d\.\d", line)), f"exit code {run.returncode}")


if __name__ == "__main__":
    sys.exit(main())

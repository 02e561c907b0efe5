"""What the machine has, and whether a kernel runs on it: the first stage, without which the others mean nothing."""

from __future__ import annotations

import shutil
import sys

import torch
from torch.utils.collect_env import get_pretty_env_info

import vcl_kernels as vk
from vcl_kernels.__main__ import main as describe

TOOLS = ("nvcc", "g++", "ninja", "compute-sanitizer")


def main() -> int:
    print(f"Python at {sys.executable}; vcl_kernels at {vk.__file__}")
    print(get_pretty_env_info())
    for tool in TOOLS:
        print(f"{tool}: {shutil.which(tool) or 'not installed'}")
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
    """Compute loss and gradient once, so that a machine on which Triton cannot compile is found at once."""
    x = torch.randn(20, 8, 6, 6, device=device, requires_grad=True)
    loss = vk.vcl_loss(x, form="variance", backend="triton")
    loss.backward()
    torch.testing.assert_close(loss, vk.reference.vcl_loss(x, form="variance"))
    print(f"a kernel ran on {x.device}: loss {loss.item():.6f}")


if __name__ == "__main__":
    sys.exit(main())

"""Every kernel once on small tensors with masked tails, for compute-sanitizer, on the GPU if there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import vcl_kernels as vk
from vcl_kernels.backends.triton.launch import Launch
from vcl_kernels.backends.triton.ops import multiply_

KERNELS = {f"{step}_{layout}" for step in ("one_pass", "moments", "backward") for layout in ("spatial", "unit")}
KERNELS |= {"finalise", "multiply"}
SHAPES = ((21, 5, 7, 7), (11, 3, 41, 41), (23, 37))  # fits on chip, does not, has no positions
UPSTREAM = 2.5
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"form": "relative_variance"})  # saved: the rows of a pair, or all of x


@contextmanager
def launched() -> Iterator[set[str]]:
    """Collect the names of the kernels that are launched inside."""
    names: set[str] = set()
    run = Launch.__call__

    def record(launch: Launch, *args: Any) -> None:
        names.add(launch.name)
        run(launch, *args)

    with mock.patch.object(Launch, "__call__", record):
        yield names


def cases(device: str) -> Iterator[torch.Tensor]:
    """Yield tensors in both layouts: none ends where a vector does, and most do not begin where one does."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device=device).to(dtype)
            yield torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
            if x.dim() == 4:
                yield x.to(memory_format=torch.channels_last)


def run(x: torch.Tensor) -> None:
    """Loss and activation, forward and backward, with an upstream gradient that is not 1."""
    for settings in SETTINGS:
        leaf = x.detach().requires_grad_()
        (vk.vcl_loss(leaf, backend="triton", **settings) * UPSTREAM).backward()
        beta = torch.ones(x.shape[1], device=x.device, requires_grad=True)
        y, loss = vk.vcl_activation(leaf, "elu", beta, backend="triton", **settings)
        torch.autograd.backward([y, loss], [torch.ones_like(y), torch.full_like(loss, UPSTREAM)])
        assert leaf.grad is not None
        multiply_(leaf.grad, torch.full_like(loss, UPSTREAM))  # on a CPU autograd leaves this to PyTorch
        if not (leaf.grad.isfinite().all() and loss.isfinite()):
            raise ArithmeticError(f"not finite: {tuple(x.shape)}, {x.dtype}, strides {x.stride()}, {settings}")
    mean, var = vk.sub_batch_moments(x.detach().requires_grad_(), 5, backend="triton")
    (mean.sum() + var.sum()).backward()


def main() -> int:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with launched() as names:
        for x in cases(device):
            run(x)
    print(f"on {device}: {', '.join(sorted(names))}")
    if names != KERNELS:
        print(f"not launched: {', '.join(sorted(KERNELS - names))}; unknown: {', '.join(sorted(names - KERNELS))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

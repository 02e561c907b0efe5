"""Helpers of the tests: layouts of a tensor, errors measured against a float64 oracle, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from vcl_kernels import reference
from vcl_kernels.options import SubBatches

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous(),
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "channel_slice": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "channels_last_slice": lambda x: LAYOUTS["channels_last"](torch.cat([x, x], 1))[:, x.shape[1] :],
    "row_stride": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "every_second_column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded_positions": lambda x: x[..., :1].expand(x.shape),
    "overlapping": lambda x: x.flatten().unfold(0, x[0].numel(), 3)[: x.shape[0]].unflatten(1, x.shape[1:]),
    "overlapping_channels": lambda x: (
        x.flatten(1).repeat(1, 2).unfold(1, x[0, 0].numel(), 1)[:, : x.shape[1]].unflatten(2, x.shape[2:])
    ),
    "samples_inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def eager(x: Tensor, beta: Tensor | float | None, g: Tensor | None, backend: str, **options) -> list[list[Tensor]]:
    """What eager PyTorch gives in x's own precision, as torch.var and (as on a GPU) with float32 sums."""
    results = [oracle(x, beta, g, dtype=x.dtype, **options)]
    if backend == "triton":
        with mock.patch.object(reference, "moments", written_out):
            results.append(oracle(x, beta, g, dtype=x.dtype, **options))
    return [list(same) for same in zip(*results, strict=True)]


def gradients(loss: Tensor, inputs: list[Tensor], g: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, g)


def written_out(x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
    """Moments in the arithmetic of x's own accumulation dtype; torch.var sums in float64 on the CPU."""
    n, K, per_activation = sub_batches
    samples = x[: K * n].unflatten(0, (K, n))
    samples = samples.float() if samples.dtype in (torch.float16, torch.bfloat16) else samples
    over = [1] if per_activation else [1, *range(3, samples.dim())]
    mean = samples.mean(over, keepdim=True)
    count = samples[0, :, 0].numel() if not per_activation else n
    return mean.squeeze(over), (samples - mean).square().sum(over) / (count - 1)


def oracle(x: Tensor, beta: Tensor | float | None, g: Tensor | None = None, dtype=torch.float64, **options):
    """Loss, dx and dbeta from the reference on the CPU in ``dtype``; in float64 torch.var would lose digits."""
    x = x.detach().cpu().to(dtype).requires_grad_()
    inputs = [x]
    if isinstance(beta, Tensor):
        beta = beta.detach().cpu().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        inputs.append(beta)
    with mock.patch.object(reference, "moments", written_out if dtype == torch.float64 else reference.moments):
        loss = reference.vcl_loss(x, beta, **options)
    return [loss.detach(), *gradients(loss, inputs, None if g is None else g.cpu().to(loss.dtype))]


def assert_within_budget(actual: Tensor, eager: list[Tensor], exact: Tensor) -> None:
    """At most twice the error of eager PyTorch in the same precision, plus one rounding of the result."""
    assert actual.shape == exact.shape
    exact = exact.double()
    error = (actual.cpu().double() - exact).abs().max()
    of_eager = max((e.cpu().double() - exact).abs().max() for e in eager)
    if actual.dtype == torch.float64:  # eager is the oracle itself; variances' differences lose a few digits
        of_eager = 1e-13 * exact.abs().max()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max() + torch.finfo(actual.dtype).tiny
    assert error <= 2 * of_eager + rounding, f"error {error:.3g}, eager {of_eager:.3g}, rounding {rounding:.3g}"


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Wait for what another process does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)

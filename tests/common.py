"""What tests share: layouts and dtypes of x, one check against a float64 oracle, the ops of a backend, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from conftest import GPU
from torch import Tensor, nn

import vcl_kernels as vk
from vcl_kernels import reference
from vcl_kernels.backends import triton_backend
from vcl_kernels.ops import OPS
from vcl_kernels.options import SubBatches

# Settings of attach and the modules: their loss is that of ``vcl_loss(x, beta)``, and beta, from 1 on, is a parameter
LEARNED: dict[str, Any] = {"unit": "channel", "beta_mode": "learned", "num_sub_batches": 2}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "channel_slice": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "channels_last_slice": lambda x: LAYOUTS["channels_last"](torch.cat([x, x], 1))[:, x.shape[1] :],
    "row_stride": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "every_second_column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded_channels": lambda x: x[:, :1].expand(x.shape),
    "expanded_positions": lambda x: x[..., :1].expand(x.shape),
    "overlapping": lambda x: x.flatten().unfold(0, x[0].numel(), 3)[: x.shape[0]].unflatten(1, x.shape[1:]),
    "overlapping_channels": lambda x: (
        x.flatten(1).repeat(1, 2).unfold(1, x[0, 0].numel(), 1)[:, : x.shape[1]].unflatten(2, x.shape[2:])
    ),
    "samples_inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


class Model(nn.Module):
    """Any forward, ``steps(model, x)``, with attributes by name."""

    def __init__(self, steps: Callable, **attributes: Any) -> None:
        super().__init__()
        self.__dict__["steps"] = steps
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        return self.steps(self, x)


def check(function: Callable, x: Tensor, backend: str, *, beta: Any = "units", g: Tensor | None = None, **options):
    """Hold what a public function returns, and its gradients, to the error budget; return them.

    The loss is that of each unit unless ``reduction`` says otherwise: of one sum the error would be a matter of luck.
    Upstream gradients are drawn; ``g`` is that of the last output. beta is drawn where it is "units" or "scalar".
    """
    units = x.shape[1:] if options.get("unit") == "activation" else x.shape[1:2]
    if function is not vk.sub_batch_moments:
        if options.get("form") == "variance":
            beta = None
        elif isinstance(beta, str):
            drawn = torch.rand(units if beta == "units" else (), dtype=torch.promote_types(x.dtype, torch.float32))
            beta = drawn.to(x.device) + 0.1
        options = {"beta": beta, "reduction": "none", **options}
    outputs = as_tuple(getattr(reference, function.__name__)(x, **options))
    upstream = [torch.randn(t.shape) if t.shape == x.shape else torch.rand(t.shape) + 0.5 for t in outputs]
    if g is not None:
        upstream[-1] = g
    before = x.clone()
    actual = results(function, x, upstream, backend=backend, **options)
    assert torch.equal(x, before)
    exact = in_precision(torch.float64, written_out, function, x, upstream, **options)
    eager = [in_precision(x.dtype, reference.moments, function, x, upstream, **options)]
    if backend == "triton" and function is not vk.vcl_activation:  # float32 sums, as on a GPU
        eager.append(in_precision(x.dtype, written_out, function, x, upstream, **options))
    assert [t.dtype for t in actual] == [t.dtype for t in eager[0]]
    for a, e, *others in zip(actual, exact, *eager, strict=True):
        assert_within_budget(a, others, e)
    dense = torch.empty_like(x).stride() == x.stride() and x.stride(0) == x[0].numel()
    if dense and 1 not in x.shape:  # the stride of a dimension of size 1 means nothing
        assert {t.stride() for t in (*actual, *eager[0]) if t.shape == x.shape} <= {x.stride()}
    return actual


def results(function: Callable, x: Tensor, upstream: list[Tensor] | None = None, **options) -> list[Tensor]:
    """What ``function`` returns, and its gradients by x and by a beta that is a tensor."""
    inputs = [x.detach().requires_grad_()]
    if isinstance(options.get("beta"), Tensor):
        options["beta"] = options["beta"].detach().requires_grad_()
        inputs.append(options["beta"])
    outputs = as_tuple(function(inputs[0], **options))
    given = None if upstream is None else [g.to(t) for g, t in zip(upstream, outputs, strict=True)]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, given)]


def in_precision(dtype: torch.dtype, moments: Callable, function: Callable, x: Tensor, *args, **options):
    """``results`` of the reference on the CPU in ``dtype``, with its moments computed by ``moments``."""
    if isinstance(options.get("beta"), Tensor):
        options["beta"] = options["beta"].cpu().to(torch.promote_types(dtype, torch.float32))
    with mock.patch.object(reference, "moments", moments):
        return results(getattr(reference, function.__name__), x.cpu().to(dtype), *args, **options)


def written_out(x: Tensor, sub_batches: SubBatches) -> tuple[Tensor, Tensor]:
    """Moments in the arithmetic of x's own accumulation dtype; torch.var sums in float64 on the CPU."""
    n, K, per_activation = sub_batches
    samples = x[: K * n].unflatten(0, (K, n))
    samples = samples.float() if samples.dtype in (torch.float16, torch.bfloat16) else samples
    over = [1] if per_activation else [1, *range(3, samples.dim())]
    mean = samples.mean(over, keepdim=True)
    count = samples[0, :, 0].numel() if not per_activation else n
    return mean.squeeze(over), (samples - mean).square().sum(over) / (count - 1)


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


def assert_all_close(found, wanted, **tolerance) -> None:
    """Compare tensors one by one."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def set_limit(monkeypatch, module: Any, name: str, value: int) -> None:
    """Change a constant by which a kernel's ``plan`` decides; the plans that it remembers were made by the old one."""
    monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "plan", module.plan.__wrapped__)


def named(name: str) -> dict[str, str]:
    """Arguments of vcl_activation for a name of ``options.ACTIVATIONS``."""
    return {"activation": name.removesuffix("_tanh"), "approximate": "tanh" if name == "gelu_tanh" else "none"}


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def ops_of(backend: str):
    """The registered ops, or functions like them: those of the interpreter take CPU tensors and are not registered."""
    if backend != "triton" or GPU:
        return torch.ops.vcl_kernels
    return SimpleNamespace(**{op.name: op.of_plain(getattr(triton_backend(), op.name)) for op in OPS})


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Wait for what another process does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)

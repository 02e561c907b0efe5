"""The numbers that a monitor records of a layer's input and of its VCL. Nothing here waits for a device."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import channels_first
from ..functional import sub_batch_moments
from ..geometry import accumulation_dtype
from ..reference import bounded_beta
from ..scale import variance_over_beta
from ..torch_private import in_functorch
from .modules import VCLActivation

__all__ = ["acting_beta", "is_sharded", "of_input", "of_vcl", "why_not"]

ROUNDINGS = 8  # of one value: more of them make a unit that varies
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(x: Any) -> str | None:
    """Return why the input ``x`` of a layer has no statistics, or None if it has."""
    if not isinstance(x, Tensor):
        return f"its input is of type {type(x).__name__}, not a tensor"
    if is_sharded(x):
        return "its input is a DTensor, whose values lie in several processes"
    if x.is_nested or x.layout is not torch.strided:
        return f"its input is {'a nested' if x.is_nested else 'a sparse'} tensor"
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is of type {type(x).__name__}, a subclass of Tensor"
    if x.device.type == "meta":
        return "its input is on the meta device: it has no values"
    if x.dtype not in DTYPES:
        return f"its input has values of {x.dtype}"
    if x.dim() < 2:
        return f"its input is a {x.dim()}-D tensor, where (N, C, …) is wanted"
    if x.numel() == 0:
        return f"its input, of shape {tuple(x.shape)}, is empty"
    return "it runs inside a transform of torch.func" if in_functorch() else None


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor: to read it, processes would have to communicate."""
    loaded = sys.modules.get("torch.distributed.tensor")  # to import it takes long
    return loaded is not None and isinstance(t, loaded.DTensor)


@torch.no_grad()
def of_input(x: Tensor, n: int, unit: str) -> dict[str, Tensor]:
    """Return variance, constancy and kurtosis of x ``(N, C, *spatial)``, each a scalar on x's device."""
    x = x.detach().to(accumulation_dtype(x.dtype))
    over = [0] if unit == "activation" else [0, *range(2, x.dim())]
    mean = x.mean(over, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(over, keepdim=True)
    # A unit of one value has a variance of 0, but for the rounding of its mean
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps * mean.abs()
    varies = ~(variance <= rounding.square()).flatten()  # NaN stays
    # Divided before the power, which otherwise leaves float32's range for a deviation of 1e-10 or 1e10
    fourth = (centred / variance.sqrt()).square().square().mean(over)
    found = {"kurtosis": _mean_where(varies, fourth)}
    M = n if unit == "activation" else n * math.prod(x.shape[2:])
    if x.shape[0] >= 2 * n and M >= 2:
        _, var = sub_batch_moments(x, n, unit=unit)  # type: ignore[arg-type]
        mean_var = var.mean(0)
        found |= {
            "variance": mean_var.mean(),
            "constancy": _mean_where(varies & (mean_var != 0).flatten(), (var / mean_var).var(0)),
        }
    return found


def _mean_where(varies: Tensor, values: Tensor) -> Tensor:
    """Mean over units that vary."""
    return torch.where(varies, values.reshape(varies.shape), 0.0).sum() / varies.sum()


@torch.no_grad()
def acting_beta(vcl: VCLActivation, x: Tensor, like: Tensor) -> Tensor | None:
    """Return the beta that acts on ``x``, of the dtype and device of ``like``.

    None: the form has none, it has no shape yet and gets none from such a short batch, or it is sharded.
    """
    beta = vcl.beta
    if vcl.form == "variance" or (beta is not None and is_sharded(beta)):
        return None
    if vcl.beta_mode == "running":
        if x.shape[0] < 2 * vcl.sub_batch_size:
            return None
        return torch.as_tensor(bounded_beta(vcl.followed(channels_first(x, vcl.channel_dim)).to(like), vcl.least_beta))
    lazy = beta is not None and is_lazy(beta)
    if lazy and x.shape[0] < 2 * vcl.sub_batch_size:
        return None
    value = like.new_full((), vcl.beta_init) if beta is None or lazy else beta.detach().to(like)
    return torch.as_tensor(bounded_beta(value, vcl.least_beta))


@torch.no_grad()
def of_vcl(vcl: VCLActivation, beta: Tensor | None, x: Tensor) -> dict[str, Tensor]:
    """Return beta, its least value and the variance that it asks for; the input x is ``(N, C, *spatial)``."""
    if beta is None:
        return {}
    found = {"beta": beta.mean(), "beta_least": beta.min()}
    M = vcl.sub_batch_size * (1 if vcl.unit == "activation" else math.prod(x.shape[2:]))
    if vcl.form == "ratio" and M >= 2:
        found["scale"] = found["beta"] * variance_over_beta(M)
    return found

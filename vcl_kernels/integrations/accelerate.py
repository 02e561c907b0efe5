"""VCL in a loop of Hugging Face accelerate.

Without ``inject`` nothing is needed: ``accelerator.backward(loss + handle.loss())`` divides and scales both. What is
here is for a loop that stays as it is.
"""

from __future__ import annotations

import weakref
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..nn.attach import attach as attach_alone
from ..nn.handle import VCLHandle

__all__ = ["attach", "follow"]


def attach(accelerator: Accelerator, model: nn.Module, example_input: Any = None, **settings: Any) -> VCLHandle:
    """Give ``model`` VCL with ``inject=True``, which counts and scales as ``accelerator.backward`` does the loss.

    Call it before ``accelerator.prepare``: learned betas must be in the optimizer, and in what wraps the model. The
    loop stays as it is; ``accelerator.accumulate`` may be in it.

    Args:
        accelerator: of the loop.
        model, example_input, settings: as for :func:`vcl_kernels.attach`.

    Returns:
        The handle, for logs: ``accelerator.log({f"vcl_loss/{name}": loss.item() for name, loss in
        handle.losses.items()})``.

    Raises:
        ValueError, TypeError: what :func:`vcl_kernels.attach` and :func:`follow` raise; ``inject=False``.
    """
    if not settings.pop("inject", True):
        raise ValueError(
            "inject=False needs nothing of this: use vcl_kernels.attach, and accelerator.backward(loss + handle.loss())"
        )
    _check(accelerator)
    handle = attach_alone(model, example_input, inject=True, **settings)
    follow(handle, accelerator)
    return handle


def follow(handle: VCLHandle, accelerator: Accelerator) -> None:
    """Divide and scale the gradient of an injected loss as ``accelerator.backward`` does that of the loss.

    ``handle.grad_scaler`` is the accelerator's, and ``handle.accumulation`` is its ``gradient_accumulation_steps`` at
    each forward, until it is set by hand or the accelerator is gone. (Compiled code keeps the value
    it was compiled with.)

    Args:
        handle: made with ``inject=True``.
        accelerator: of the loop.

    Raises:
        TypeError: they are of other types.
        ValueError: the handle is without ``inject``, or was removed; DeepSpeed or Megatron-LM, which divide and scale
            the loss themselves.
    """
    _check(accelerator)
    if not isinstance(handle, VCLHandle):
        raise TypeError(f"handle must be what vcl_kernels.attach returned; got a {type(handle).__name__}")
    if not handle.inject:
        raise ValueError(
            "handle was made without inject=True and needs nothing: call accelerator.backward(loss + handle.loss())"
        )
    if not handle.layers:
        raise ValueError("handle was removed; call vcl_kernels.attach again")
    known = weakref.ref(accelerator)

    def steps() -> int:
        there = known()
        return 1 if there is None else there.gradient_accumulation_steps

    handle.grad_scaler = accelerator.scaler
    handle.follow_accumulation(steps)


def _check(accelerator: Any) -> None:
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator; got a {type(accelerator).__name__}")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} divides and scales the loss itself; use vcl_kernels.attach without "
            "inject, and accelerator.backward(loss + handle.loss())"
        )

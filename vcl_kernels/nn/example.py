"""A forward of a model on an example."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..torch_private import map_tensors

__all__ = ["copied", "evaluate", "run"]

copied = partial(map_tensors, torch.clone)


def run(model: nn.Module, example: Any) -> Any:
    """Return the output of ``model`` for a copy of ``example`` (a tensor, or tuple or mapping of arguments).

    It runs without gradients if it can, uncompiled. A transformer layer's fast path calls no module, so it is off.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # that global hooks run for a wrapper too
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # of reentrant checkpointing
            try:
                with torch.no_grad():
                    return _call(model, example)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            with torch.enable_grad():  # the forward differentiates: it computes forces, for instance
                return _call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**copied(dict(example)))
    return model(*copied(example)) if isinstance(example, tuple) else model(copied(example))


def evaluate(model: nn.Module, example: Any) -> Any:
    """The same in evaluation. Modes are set by attribute: an adapter's ``eval()`` may merge its weights."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return run(model, example)
    finally:
        for module, mode in modes:
            module.training = mode

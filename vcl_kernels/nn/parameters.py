"""Betas among the parameters and the state of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .modules import VCLActivation

__all__ = ["attached_betas", "betas_of", "is_beta", "param_groups", "plain_state_dict"]


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups in which biases and the betas of VCL are not decayed, and all else is.

    >>> from vcl_kernels import VCL
    >>> net = nn.Sequential(nn.Linear(4, 8), VCL(8, beta_mode="learned"), nn.ELU())
    >>> [len(group["params"]) for group in param_groups(net, 1e-4)]
    [1, 2]
    """
    decays: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_bias = name.startswith("bias") or name.endswith("bias")  # an LSTM has bias_ih_l0
            decays.setdefault(parameter, not is_bias and not isinstance(module, VCLActivation))
    return [
        {"params": [p for p, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]


def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``state_dict`` without the betas of attach. The plain model loads it with ``strict=True``.

    The other way needs nothing: an attached model loads the state dict of a plain one, and its betas stay as they are.

    >>> import torch
    >>> from vcl_kernels import attach
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ELU())
    >>> handle = attach(net, torch.randn(2, 4), beta_mode="learned")
    >>> list(net.state_dict())
    ['0.weight', '0.bias', '1.vcl.0.beta']
    >>> list(plain_state_dict(net.state_dict()))
    ['0.weight', '0.bias']
    """
    return {name: value for name, value in state_dict.items() if not is_beta(name)}


def is_beta(name: str) -> bool:
    """Whether ``name``, of a state dict, is that of a beta of attach."""
    return re.search(r"(^|\.)vcl\.\d+\.beta$", name) is not None


def betas_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the betas of attach that a state dict has, by their names there."""
    state = {
        f"{name}.beta": module.beta
        for name, module in model.named_modules()
        if isinstance(module, VCLActivation) and module.beta is not None
    }
    return {name: beta for name, beta in state.items() if is_beta(name)}


def attached_betas(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of them. Those without a shape yet are left out."""
    return {name: beta.detach().clone() for name, beta in betas_of(model).items() if not is_lazy(beta)}

"""Whether a derivative is taken that kernels do not have: of ``torch.func``, or in forward mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _never() -> bool:
    """Stand for torch's question where a torch has none; autograd functions then refuse by themselves."""
    return False


# Whether grad, vmap or another transform of torch.func runs. Private: Dynamo can answer no public question of it.
in_functorch = getattr(torch._C, "_are_functorch_transforms_active", _never)

# A private count of dual levels, -1 outside of any, which Dynamo guards on; it saves a small call the time of asking
# tensors, which is what is done where a torch has no count.
_levels: Any = forward_ad if hasattr(forward_ad, "_current_level") else None


def has_transform(x: Tensor, beta: object) -> bool:
    """Whether a transform of ``torch.func`` runs, or x or beta has a tangent.

    Compiled code does not see the tangents of its inputs: in a dual level the answer then is that they may have one.
    Without the count it is that they have none.
    """
    if in_functorch():
        return True
    if _levels is not None and _levels._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        return _levels is not None
    return _has_tangent(x) or (isinstance(beta, Tensor) and _has_tangent(beta))


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None

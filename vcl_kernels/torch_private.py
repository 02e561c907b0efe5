"""Every private name of PyTorch that the package uses, each with what is done in a torch that lacks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _never(*_: Any) -> bool:
    return False


def _always(*_: Any) -> bool:
    return True


# Of transforms and tracing. Found once, at import: Dynamo traces a call of these functions, not a search for them.

# Whether grad, vmap or another transform of torch.func runs. Dynamo can answer no public question of it. Without it:
# no; autograd functions then refuse by themselves.
in_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _never)

# Whether the graph stays for another backward, so that saved tensors must not change. Without it: yes.
keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", _always)

# Whether g stands for other values too: for make_fx, is_grads_batched or vmap. Without one of them: yes.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _always)
_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", _always)
_is_wrapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", _always)

# Its attribute _current_level is -1 outside of any dual level, and Dynamo guards on it. Asking it saves a small call
# the time of asking tensors for their tangents, which is what is done without it.
_levels: Any = forward_ad if hasattr(forward_ad, "_current_level") else None


def is_traced(g: Tensor) -> bool:
    """Whether ``g`` stands for other values too: for a compiler, ``make_fx``, ``vmap`` or ``is_grads_batched``."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _is_batched(g) or _is_wrapped(g)


def has_transform(x: Tensor, beta: object) -> bool:
    """Whether a derivative is taken that kernels do not have: a transform of ``torch.func``, or in forward mode.

    Compiled code does not see the tangents of its inputs. In a dual level the answer then is that they may have one;
    where torch does not tell the level, it is that they have none.
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

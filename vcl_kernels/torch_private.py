"""Every private name of PyTorch that the package uses, each with what is done in a torch that lacks it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _never(*_: Any) -> bool:
    return False


def _always(*_: Any) -> bool:
    return True


# Transforms and tracing. Looked up once, at import: Dynamo traces a call of these functions, but not the look-up.

# Whether a transform of torch.func (grad, vmap, …) runs. Dynamo traces no public function that tells. Fallback: no;
# autograd functions then raise by themselves.
in_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _never)

# Whether the graph stays for another backward, so that saved tensors must not change. Fallback: yes.
keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", _always)

# The number of the backward pass that runs on this thread; -1 if none does. Fallback: none does.
_backward_pass: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

# Whether a tensor is traced or batched: by make_fx, is_grads_batched or vmap. Fallback for each: yes.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _always)
_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", _always)
_is_wrapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", _always)

# forward_ad._current_level is -1 outside of any dual level, and Dynamo guards on it. Reading it takes less time than
# asking each tensor for its tangent, which is the fallback.
_levels: Any = forward_ad if hasattr(forward_ad, "_current_level") else None


def in_backward() -> bool:
    """Whether a backward pass runs: a forward is then a checkpoint's recomputation. A compiler has none."""
    return not torch.compiler.is_compiling() and _backward_pass() >= 0


def is_traced(g: Tensor) -> bool:
    """Whether ``g`` stands for other values too: under a compiler, ``make_fx``, ``vmap`` or ``is_grads_batched``."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _is_batched(g) or _is_wrapped(g)


def without_modes() -> AbstractContextManager[Any]:
    """A context in which no dispatch mode sees what runs: a selective checkpoint's takes each operation for its own.

    Fallback: they see it.
    """
    if _dispatch_modes() == 0:
        return nullcontext()
    disable = getattr(getattr(torch.utils, "_python_dispatch", None), "_disable_current_modes", nullcontext)
    return disable()


def has_transform(x: Tensor, beta: object) -> bool:
    """Whether a transform of ``torch.func`` runs, or x or beta has a tangent (forward mode): kernels have neither.

    A compiler does not see tangents. It gets True in a dual level, and False where torch does not tell the level.
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


# Modules


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that hold the hooks of ``module``, as far as this version has them: dictionaries, and a flag."""
    return {name: value for name, value in vars(module).items() if "hook" in name}


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries that hold the hooks of forwards and backwards of ``module``, and flags of these hooks."""
    return [value for name, value in hooks_of(module).items() if isinstance(value, dict) and "state" not in name]


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward of ``module`` runs hooks."""
    return any(hook_tables(module))


def has_global_hooks() -> bool:
    """Whether there are hooks for the forwards of all modules. Fallback: no."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(getattr(nn.modules.module, name, None) for name in names)


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Remove the hooks of ``module`` that are methods of ``owner``, as far as they were registered."""
    tables = [table for table in hooks_of(module).values() if isinstance(table, dict)]
    keys = [key for table in tables for key, hook in list(table.items()) if _owner_of(hook) is owner]
    for table in tables:
        for key in keys:
            table.pop(key, None)


def _owner_of(hook: Any) -> Any:
    return getattr(getattr(hook, "func", hook), "__self__", None)  # also of functools.partial


def batch_norm_types() -> tuple[type[nn.Module], ...]:
    """The base of all batch norms, or its public subclasses."""
    public = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    lazy = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
    base = getattr(nn.modules.batchnorm, "_BatchNorm", None)
    return (*public, *lazy) if base is None else (base,)


def dims_checked(norm: nn.Module) -> int | None:
    """The number of dimensions that a batch norm takes; None if it takes several, or PyTorch does not tell."""
    checked = {getattr(kind, "_check_input_dim", None): n for n, kind in ((4, nn.BatchNorm2d), (5, nn.BatchNorm3d))}
    return None if None in checked else checked.get(getattr(type(norm), "_check_input_dim", None))


def version_of(x: Tensor) -> int:
    """How many times ``x`` was changed in place, if PyTorch tells; an optimizer's step is a change."""
    return getattr(x, "_version", 0)


def scaler_that_steps() -> torch.amp.GradScaler | None:
    """The enabled GradScaler whose ``step`` called what runs now. Fallback: none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler = frame.f_locals.get("self")
            return scaler if scaler is not None and scaler.is_enabled() else None
        frame = frame.f_back
    return None


def runs_inside_itself(module: nn.Module) -> bool:
    """Whether the forward of ``module`` that begins now was called by one that runs. Fallback: no."""
    return not torch.compiler.is_compiling() and _forwards_that_run(module) > 1


def is_running(module: nn.Module) -> bool:
    """Whether a forward of ``module`` runs on this thread. Fallback: no."""
    return _forwards_that_run(module) > 0


def _forwards_that_run(module: nn.Module) -> int:
    frame, forwards = inspect.currentframe(), 0
    while frame is not None:
        forwards += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return forwards


# What torch.compile, and torch's wrappers of parts of a model, put into the names of modules
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def inside_compiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, if ``module`` is its result; else ``module`` itself."""
    return getattr(module, _WRAPPED[0], module)


def plain_name(name: str) -> str:
    """The name of a module without what wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def compiles_itself(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called. Fallback: no."""
    return getattr(module, "_compiled_call_impl", None) is not None


def may_be_compiled() -> bool:
    """Whether the compiler was imported; without it nothing is compiled, and to import it takes seconds."""
    return "torch._dynamo" in sys.modules


def while_tracing(function: Callable[..., bool]) -> Any:
    """Let a compiler call ``function`` while it traces: its graph has no trace of it, and guards on nothing.

    As ``torch.compiler.assume_constant_result``, which imports the compiler at once.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Stance(NamedTuple):
    """What compiled code does when it is called: the arguments of ``torch.compiler.set_stance``."""

    stance: str = "default"
    skip_guard_eval_unsafe: bool = False
    force_backend: Any = None


def compiler_stance() -> Stance | None:
    """The stance of the compiler at present, if PyTorch tells."""
    now: Any = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)
    if not hasattr(now, "stance"):
        return None
    return Stance(now.stance, getattr(now, "skip_guard_eval_unsafe", False), getattr(now, "backend", None))


def is_batched(g: Tensor) -> bool:
    """Whether ``g`` stands for the gradients of several backward passes. Fallback: no."""
    legacy = getattr(torch._C._functorch, "is_legacy_batchedtensor", _never)
    return legacy(g) or getattr(torch._C._functorch, "is_functorch_wrapped_tensor", _never)(g)


def is_replica(module: nn.Module) -> bool:
    """Whether ``module`` is one of the copies that ``nn.DataParallel`` makes for a forward."""
    return getattr(module, "_is_replica", False)


def base_of(x: Tensor) -> Tensor:
    """The tensor that ``x`` is a view of; ``x`` itself if it is no view, or if PyTorch does not tell."""
    base = getattr(x, "_base", None)
    return x if base is None else base


# Nested containers

pytree: Any = getattr(torch.utils, "_pytree", None)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested containers; the fallback knows tuples, lists and mappings."""
    if pytree is not None:
        return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return [values] if isinstance(values, Tensor) else []


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Apply ``function`` to the tensors in nested containers; the fallback knows tuples, lists and dicts."""
    if pytree is not None:
        return pytree.tree_map_only(Tensor, function, values)
    if isinstance(values, dict):
        return type(values)((name, map_tensors(function, value)) for name, value in values.items())
    if isinstance(values, (tuple, list)):
        mapped = [map_tensors(function, value) for value in values]
        return type(values)(*mapped) if hasattr(values, "_fields") else type(values)(mapped)
    return function(values) if isinstance(values, Tensor) else values


# Ops


dispatch_mode: Any = getattr(getattr(torch.utils, "_python_dispatch", None), "TorchDispatchMode", None)


def watching_ops(callback: Callable[[list[Tensor]], None]) -> AbstractContextManager[Any]:
    """While entered, calls ``callback`` with the tensors that each op takes.

    Raises:
        NotImplementedError: torch has no dispatch modes; there is no fallback, and nothing is seen.
    """
    if dispatch_mode is None:
        raise NotImplementedError("this torch does not tell which ops run (torch.utils._python_dispatch)")

    class Watching(dispatch_mode):
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            callback(tensors_in((args, kwargs or {})))
            return func(*args, **(kwargs or {}))

    return Watching()

"""Traces of a model's forward: what they show of its batch norms, and whether removing these changes them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator
from enum import Enum
from functools import partial
from itertools import product
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..torch_private import has_global_hooks, hook_tables, tensors_in
from .code import asks_for_tensors
from .flow import OTHER, Flow, InstrumentedCopy
from .parts import OTHER_DEPENDENCY, Change, Parts, Redirect, Twins, copy_of, error_text, same_random_numbers
from .trial import MODULE_ATTRIBUTES

__all__ = ["check_traces", "follow_traces"]

MOST_TRACES = 8  # in each mode: arguments that are None by default, or True or False, in all combinations
METADATA = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "is_cuda"}  # reading them is no use of values
PLAIN = (type(None), bool, int, float, str, Enum, type, torch.dtype, torch.device, torch.memory_format, Tensor)
PASSED = object()  # the caller passes the argument: its value is unknown

Steps = list[Any]  # of a trace: texts, and tensors that are constants in it


def follow_traces(parts: Parts) -> tuple[Flow, list[Steps]]:
    """Return what traces show, in both modes, and the steps of each.

    Raises:
        Exception: the forward cannot be traced, or does what a trace does not show.
    """
    _check_traceable(parts)
    flow, traces = Flow(), []
    for training, arguments in _modes_and_arguments(parts.model):
        followed = InstrumentedCopy(parts, training)
        graph = _trace(followed.model, parts, followed.twins, arguments)
        _read(graph, followed)
        steps = _steps(graph, followed.model)
        followed.close()
        traces.append(_steps_of_copy(parts, training, arguments))
        if not _are_equal(steps, traces[-1]):
            raise ValueError(f"the forward of {type(parts.model).__name__} takes other steps each time")
        flow.add(followed.flow)
    return flow, traces


def check_traces(parts: Parts, before: list[Steps], change: Change, changed: str) -> None:
    """Raise ValueError if the forward of a copy is traced otherwise after ``change``.

    Args:
        parts: those of the model.
        before: the steps of its traces.
        change: carries the change out on a copy.
        changed: what was changed, for the message.
    """
    for steps, way in zip(before, _modes_and_arguments(parts.model), strict=True):
        try:
            after = _steps_of_copy(parts, *way, change)
        except Exception as error:
            what = f"raises {error_text(error)}"
        else:
            if _are_equal(steps, after):
                continue
            what = "takes other steps"
        raise ValueError(
            f"the forward of model ({type(parts.model).__name__}), traced on a copy, {what} after {changed}. "
            f"{OTHER_DEPENDENCY}"
        )


def _steps_of_copy(parts: Parts, training: bool, arguments: dict[str, Any], change: Change | None = None) -> Steps:
    copied, twins = copy_of(parts, training)
    if change is not None:
        change(twins)
    for own in parts.names:
        twins[own].forward = partial(_call, twins[own])  # called as a function, it is one step too
    steps = _steps(_trace(copied, parts, twins, arguments), copied)
    for own in parts.names:
        del twins[own].forward
    return steps


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _check_traceable(parts: Parts) -> None:
    """Raise ValueError where a trace would not show what a forward does."""
    model = parts.model
    if "forward" in vars(model):
        raise ValueError(f"the forward of {type(model).__name__} is replaced on the object")
    for module in model.modules():
        if any(_is_users_hook(hook) for table in hook_tables(module) for hook in table.values()):
            raise ValueError(f"{type(module).__name__} has hooks, which a trace does not run")
    if has_global_hooks():
        raise ValueError("there are hooks for all modules, which a trace does not run")
    tracer = _Tracer(parts.names)
    found = asks_for_tensors([model, *(m for m in model.modules() if not tracer.is_leaf_module(m, ""))])
    if found:
        raise ValueError(f"{found}, and may ask whether a value is one; in a trace, none is")


def _is_users_hook(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or type(hook).__module__ or ""
    return hook is not True and not module.startswith("torch.")  # torch's own are weight_norm's, for instance


def _modes_and_arguments(model: nn.Module) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yield modes and the arguments that are fixed: an option is given or None, True or False; others at defaults."""
    fixed, choices = {}, {}
    for name, p in inspect.signature(model.forward).parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(f"the forward of {type(model).__name__} takes any arguments ({p})")
        if p.default is None or isinstance(p.default, bool):
            choices[name] = (PASSED, None) if p.default is None else (False, True)
        elif p.default is not inspect.Parameter.empty:
            fixed[name] = p.default
    if 2 ** len(choices) > MOST_TRACES:
        raise ValueError(
            f"the forward of {type(model).__name__} has {len(choices)} options ({', '.join(choices)}), and at most "
            f"{MOST_TRACES} combinations are traced"
        )
    for training in (False, True):
        for chosen in product(*choices.values()):
            of_options = dict(zip(choices, chosen, strict=True))
            yield training, fixed | {name: value for name, value in of_options.items() if value is not PASSED}


def _trace(model: nn.Module, parts: Parts, twins: Twins, arguments: dict[str, Any]) -> fx.Graph:
    leaves = {twins[own] for own in parts.names}
    with same_random_numbers(model), warnings.catch_warnings(), Redirect(parts, twins):
        warnings.simplefilter("ignore")  # of copies, which the user does not have
        tracer = _Tracer(leaves)
        try:
            return tracer.trace(model, concrete_args=arguments or None)
        finally:
            vars(tracer).clear()  # it refers to itself, and so would keep the copy


class _Tracer(fx.Tracer):
    """Takes ``leaves`` for one step, and modules that hold none of them and nothing through which to reach one."""

    def __init__(self, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, _name: str) -> bool:
        """Whether ``m`` is one step."""
        return m in self.leaves or all(inside not in self.leaves and _is_closed(inside) for inside in m.modules())


def _is_closed(module: nn.Module) -> bool:
    """Whether ``module`` reaches no others but its children."""
    if "forward" in vars(module):
        return False
    return type(module).__module__.startswith(("torch.nn.", __package__)) or all(
        _is_plain(value) for name, value in vars(module).items() if name not in MODULE_ATTRIBUTES
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (*PLAIN, BuiltinFunctionType)) or (
        isinstance(value, FunctionType) and value.__closure__ is None
    )


def _read(graph: fx.Graph, followed: InstrumentedCopy) -> None:
    """Note what a traced forward does with norms and layers."""
    flow, norms = followed.flow, followed.parts.norms

    def module_of(node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return followed.originals.get(followed.model.get_submodule(str(node.target)))

    def is_identity(node: fx.Node) -> bool:
        return node.op == "call_module" and type(followed.model.get_submodule(str(node.target))) is nn.Identity

    def users_of(node: fx.Node) -> Iterator[Any]:
        for user in node.users:
            if is_identity(user):
                yield from users_of(user)
            elif not _reads_metadata(user):
                module = module_of(user)
                yield module if module in norms else OTHER

    for node in graph.nodes:
        module = module_of(node)
        if module is not None and module in norms:
            sources = list(node.all_input_nodes)
            while len(sources) == 1 and is_identity(sources[0]):
                sources = list(sources[0].all_input_nodes)
            layer = module_of(sources[0]) if len(sources) == 1 else None
            flow.inputs[module].add(layer if layer in followed.parts.layers else OTHER)
        elif module is not None:
            flow.users[module].update(users_of(node))
        elif node.op == "get_attr":
            _read_attribute(str(node.target), followed)
    for inside in followed.model.modules():  # what is kept may be used in the next forward
        for value in vars(inside).values():
            for kept in _proxies_in(value):
                layer = module_of(kept.node)
                if layer is not None and layer not in norms:
                    flow.users[layer].add(OTHER)


def _read_attribute(target: str, followed: InstrumentedCopy) -> None:
    owner, _, name = target.rpartition(".")
    module = followed.originals.get(followed.model.get_submodule(owner))
    if module is None:
        return
    if module in followed.parts.norms:
        followed.parts.reads.setdefault(module, name)
    else:
        followed.read_layer(module)


def _reads_metadata(node: fx.Node) -> bool:
    name = node.args[1] if node.op == "call_function" and node.target is getattr else node.target
    return node.op in ("call_function", "call_method") and name in METADATA


def _proxies_in(value: Any) -> Iterator[fx.Proxy]:
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, (list, tuple, set, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _proxies_in(item)


def _steps(graph: fx.Graph, model: nn.Module) -> Steps:
    """Return the steps of a graph as text, and the values of tensors that are constants in it."""
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    steps: list[Any] = []
    for node in graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda argument: f"step {numbers[argument]}")
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            steps += tensors_in(getattr(model, str(node.target)))
        else:
            steps.append(f"{node.op} {node.target} {arguments}")
    return steps


def _are_equal(steps: Steps, others: Steps) -> bool:
    return len(steps) == len(others) and all(map(_is_equal, steps, others))


def _is_equal(step: Any, other: Any) -> bool:
    if isinstance(step, Tensor) and isinstance(other, Tensor):
        return step.shape == other.shape and torch.allclose(step, other, 0, 0, equal_nan=True)
    return type(step) is type(other) and bool(step == other)

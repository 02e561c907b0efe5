"""What attach finds to doubt: rows that are no samples, missing kernels, processes that drift apart."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends import backends, choose
from .functions import NAMES, FunctionCall
from .probe import Call
from .wrappers import wrapper_of

__all__ = ["check_not_wrapped_outside", "scripted_activations", "tell_backend", "tell_rows", "written"]

Tell = Callable[[str, str], None]  # kind and text of a warning


def written(calls: list[FunctionCall], names: dict[nn.Module, str], activations: set[nn.Module]) -> list[str]:
    """Return each function call as text, with the remedy where it is known: a layer that is no activation itself."""
    found = []
    for call in calls:
        owner = names.get(call.owner) if call.owner is not None else None
        place = type(call.owner).__name__ if owner is None else repr(owner) if owner else "the model's forward"
        source = next((names[s] for s in call.sources if names.get(s) and s not in activations), None)
        found.append(f"{call.function} in {place}" + (f" (after={source!r})" if source else ""))
    return found


def scripted_activations(model: nn.Module) -> dict[str, str]:
    """Return the modules of ``model`` that torch.jit compiled with an activation in them, by name, and their types."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if isinstance(module, torch.jit.ScriptModule) and not inside and hasattr(module, "forward"):
            functions = re.findall(r"aten::(\w+)", str(module.inlined_graph))
            if NAMES.intersection(function.rstrip("_") for function in functions):
                found[name] = getattr(module, "original_name", type(module).__name__)
    return found


def tell_rows(layers: dict[str, list[Call]], rows: set[int], tell: Tell) -> None:
    """Tell where dimension 0 is not the example's batch: a sub-batch would be of time steps, or of one row."""
    for name, calls in layers.items():
        for call in calls:
            shape = tuple(call.x.shape)
            if call.time_first and call.x.dim() > 2:
                why = "inside a module with batch_first=False, whose dimension 0 is time"
            elif rows and all(shape[0] % max(of_example, 1) for of_example in rows):
                why = f"while the example has {' or '.join(map(str, sorted(rows)))} rows"
            else:
                continue
            tell(
                "dimension 0",
                f"layer {name!r} gets VCL of a tensor of shape {shape}, {why}. VCL takes dimension 0 for samples, and "
                "its sub-batches would be something else. Leave the layer out with layers=, or make the batch the "
                "first dimension",
            )


def tell_backend(tensors: list[Tensor], backend: str | None, tell: Tell) -> None:
    """Tell where the kernels of a device are missing and the plain PyTorch reference runs instead."""
    for device, name in (("cpu", "cpu"), ("cuda", "triton")):
        on_device = [t for t in tensors if t.device.type == device]
        if backend is None and on_device and choose(None, on_device[0]) == "reference":
            tell(
                "backend",
                f"VCL runs on the plain PyTorch reference, which is several times slower, because the {name!r} kernels "
                f"cannot run: {backends()[name]}. Pass backend='reference' to accept that",
            )


def check_not_wrapped_outside(model: nn.Module) -> None:
    """Raise ValueError if a module that is wrapped for distributed training has ``model`` inside."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for outer in gc.get_objects():
        if not issubclass(type(outer), nn.Module) or outer is model:
            continue
        kind = wrapper_of(outer)
        if kind is not None and any(module is model for module in outer.modules()):
            raise ValueError(
                f"model is inside {kind}, which goes on with the parameters that it knows: new ones would drift apart "
                "between processes. Wrap it afterwards"
            )

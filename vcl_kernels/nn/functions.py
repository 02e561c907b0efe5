"""Activations that a forward calls as functions: no module stands there to which attach could give a VCL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FunctionCall", "FunctionCalls"]

# fmt: off
NAMES = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "expit", "logsigmoid", "log_sigmoid", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softsign", "softshrink",
    "hardshrink", "tanhshrink", "threshold",
))
# fmt: on


class FunctionCall(NamedTuple):
    """One call of an activation function."""

    function: str  # as users write it: F.relu, torch.tanh, Tensor.sigmoid
    owner: nn.Module | None  # in whose forward it stands
    source: nn.Module | None  # whose output is its input, if any


class FunctionCalls(TorchFunctionMode):
    """While entered, keeps the calls of activation functions on tensors of two or more dimensions.

    Args:
        running: the modules whose forwards run, innermost last; the caller keeps it up to date.
    """

    def __init__(self, running: list[nn.Module]) -> None:
        super().__init__()
        self.running = running
        self.found: list[FunctionCall] = []
        self.sources = WeakTensorKeyDictionary()  # the module that returned a tensor

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``; keep it if it is an activation function."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").rstrip("_") in NAMES:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and x.dim() > 1:
                owner = self.running[-1] if self.running else None
                self.found.append(FunctionCall(_written(func), owner, self.sources.get(x)))
        return func(*args, **kwargs)


def _written(func: Callable[..., Any]) -> str:
    """Return the name of ``func`` as users write it."""
    name = resolve_name(func) or func.__name__
    for long, short in (("torch.nn.functional.", "F."), ("torch._C._nn.", "F."), ("torch.Tensor.", "Tensor.")):
        name = name.replace(long, short)
    return name

"""Activations that a forward calls as functions: no module stands there to which attach could give a VCL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from ..torch_private import base_of, version_of

__all__ = ["NAMES", "FunctionCall", "FunctionCalls"]

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
    sources: list[nn.Module]  # that returned its input, or what that is a view of; the innermost first


class FunctionCalls(TorchFunctionMode):
    """While entered, keeps the calls of activation functions on tensors of two or more dimensions.

    Args:
        running: the modules whose forwards run, innermost last; the caller keeps it up to date.
    """

    def __init__(self, running: list[nn.Module]) -> None:
        super().__init__()
        self.running = running
        self.found: list[FunctionCall] = []
        self._sources = WeakTensorKeyDictionary()  # the modules that returned a tensor

    def returned(self, module: nn.Module, y: Any) -> None:
        """Note that ``module`` returned y."""
        if isinstance(y, Tensor):
            self._sources.setdefault(y, []).append(module)
            self._sources.setdefault(base_of(y), [module])

    def call(self, name: str, x: Any) -> FunctionCall:
        """Return the call of an activation on ``x`` that is made now."""
        sources = (self._sources.get(x) or self._sources.get(base_of(x)) or []) if isinstance(x, Tensor) else []
        return FunctionCall(name, self.running[-1] if self.running else None, list(sources))

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``; keep it if it is an activation function."""
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if getattr(func, "__name__", "").rstrip("_") not in NAMES or not _may_have_vcl(x):
            return func(*args, **kwargs)
        call, version = self.call(_written(func), x), version_of(x)
        y = func(*args, **kwargs)
        self.found.append(call if version_of(x) == version else call._replace(sources=[]))  # VCL needs what x was
        return y


def _may_have_vcl(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and x.dim() > 1


def _written(func: Callable[..., Any]) -> str:
    """Return the name of ``func`` as users write it."""
    name = resolve_name(func) or func.__name__
    for long, short in (("torch.nn.functional.", "F."), ("torch._C._nn.", "F."), ("torch.Tensor.", "Tensor.")):
        name = name.replace(long, short)
    return name

"""Where the outputs of layers go in a model's forward, and where the inputs of its batch norms come from."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..torch_private import watching_ops
from .example import run
from .fused import first_input
from .parts import Parts, Redirect, change_class, copy_of, same_random_numbers

__all__ = ["OTHER", "PARAMETER", "Flow", "InstrumentedCopy", "follow_example"]

OTHER = "other"
PARAMETER = "parameter"  # a use of a layer by its weight or bias


class Flow:
    """What forwards showed. Its modules are those of the model, not of the copies that ran."""

    def __init__(self) -> None:
        self.inputs: defaultdict[nn.Module, set[Any]] = defaultdict(set)  # of a norm: layers that returned them, OTHER
        self.users: defaultdict[nn.Module, set[Any]] = defaultdict(set)  # of a layer's outputs: norms, OTHER, PARAMETER
        self.dims: defaultdict[nn.Module, set[int]] = defaultdict(set)  # of a norm's inputs, in an example's run

    def add(self, other: Flow) -> None:
        """Take over what another one showed."""
        for mine, others in ((self.inputs, other.inputs), (self.users, other.users), (self.dims, other.dims)):
            for module, found in others.items():
                mine[module] |= found


class InstrumentedCopy:
    """A copy of a model whose norms and layers tell when they are called, and when others read what they have.

    A ``twin`` is a module of the copy, and ``own`` the same one of the model itself, under which all is noted.
    """

    def __init__(self, parts: Parts, training: bool) -> None:
        self.parts, self.flow = parts, Flow()
        self.model, self.twins = copy_of(parts, training)
        self.running: list[nn.Module] = []  # norms and layers
        self.made: dict[int, tuple[nn.Module, weakref.ref[Tensor], Any]] = {}  # outputs of layers, by address
        self.inputs_of_running: list[tuple[nn.Module, int | None]] = []  # norms, and the addresses of their inputs
        self.originals = {self.twins[own]: own for own in parts.names}
        for twin, own in self.originals.items():
            (self._follow_norm if own in parts.norms else self._follow_layer)(twin, own)

    def _follow_norm(self, twin: nn.Module, own: nn.Module) -> None:
        forward = type(twin).forward

        def called(twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._called(twin, own, partial(forward, twin), args, kwargs)

        kind, names = type(twin), self.parts.names[own]

        def read(twin: nn.Module, name: str) -> Any:
            if name in names and own not in self.running:
                self.parts.reads.setdefault(own, name)
            return kind.__getattribute__(twin, name)

        change_class(twin, forward=called, __getattribute__=read)

    def _follow_layer(self, twin: nn.Module, own: nn.Module) -> None:
        # Forwards may ask for type(layer), so its class stays. Its weight and bias are read from _parameters
        forward = twin.forward
        twin.forward = lambda *args, **kwargs: self._called(twin, own, forward, args, kwargs)
        if not any(map(is_lazy, own.parameters(recurse=False))):  # a lazy layer reads them before its forward
            vars(twin)["_parameters"] = ReportingDict(vars(twin)["_parameters"], partial(self.read_layer, own))

    def read_layer(self, own: nn.Module) -> None:
        """Note that something reads the parameters of a layer."""
        if own not in self.running:
            self.flow.users[own].add(PARAMETER)

    def _called(self, twin: nn.Module, own: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        x = first_input(args, kwargs) if args or kwargs else None
        if isinstance(x, fx.Proxy):  # twin.forward(x) in a trace, which takes only twin(x) for one step
            return twin(*args, **kwargs)
        is_norm = own in self.parts.norms
        if is_norm:
            self._begin_norm(own, x)
        self.running.append(own)
        try:
            y = forward(*args, **kwargs)
        finally:
            self.running.pop()
            if is_norm:
                self.inputs_of_running.pop()
        address = None if is_norm else _address(y)
        if address is not None:
            self.made[address] = own, weakref.ref(y), y.untyped_storage()  # kept: no other tensor gets its address
        return y

    def _begin_norm(self, norm: nn.Module, x: Any) -> None:
        address = _address(x)
        self.inputs_of_running.append((norm, address))
        layer, output, _ = self.made.get(address or 0, (None, None, None))
        if layer is None or output is None or output() is not x:
            self.flow.inputs[norm].add(OTHER)
        else:
            self.flow.inputs[norm].add(layer)
            self.flow.users[layer].add(norm)
        if isinstance(x, Tensor):
            self.flow.dims[norm].add(x.dim())

    def use(self, tensors: list[Tensor]) -> None:
        """Note that an operation takes ``tensors``."""
        for address in map(_address, tensors):
            of_norm = self.inputs_of_running and self.inputs_of_running[-1][1] == address
            if address in self.made and not of_norm:
                self.flow.users[self.made[address][0]].add(OTHER)

    def close(self) -> None:
        """Let go of the copy, whose modules and classes refer to this."""
        for twin in self.originals:
            vars(twin).pop("forward", None)
        self.model, self.twins, self.originals, self.made = nn.Identity(), {}, {}, {}

    def end(self) -> None:
        """End a forward whose output is still held: what is alive is the output, or kept for another use."""
        if any(output() is not None for _, output, _ in self.made.values()):
            gc.collect()
        for layer, output, _ in self.made.values():
            if output() is not None:
                self.flow.users[layer].add(OTHER)


class ReportingDict(dict[str, Any]):
    """A dictionary that tells when a value is looked up by its name."""

    def __init__(self, values: Mapping[str, Any], tell: Callable[[], None]) -> None:
        super().__init__(values)
        self.tell = tell

    def __getitem__(self, name: str) -> Any:
        """Tell, and return the value."""
        self.tell()
        return super().__getitem__(name)


def _address(x: Any) -> int | None:
    """Return where the memory of a tensor begins; None if it has no values."""
    if not isinstance(x, Tensor) or is_lazy(x) or x.layout != torch.strided or not x.numel():
        return None
    address = x.untyped_storage().data_ptr()
    if not address:
        raise ValueError("tensors on meta have no addresses, by which they are followed")
    return address


def follow_example(parts: Parts, example: Any) -> Flow:
    """Return what a run on ``example`` shows, in both modes."""
    flow = Flow()
    for training in (False, True):
        followed = InstrumentedCopy(parts, training)
        with same_random_numbers(parts.model), warnings.catch_warnings(), Redirect(parts, followed.twins):
            warnings.simplefilter("ignore")  # of copies, which the user does not have
            with watching_ops(followed.use):
                output = run(followed.model, example)
            followed.end()
        del output
        flow.add(followed.flow)
        followed.close()
    return flow

"""Where the outputs of layers go in a model's forward, and where the inputs of its batch norms come from."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..torch_private import watching_ops
from .example import run
from .fused import first_input
from .norms import own_names
from .trial import model_copy

__all__ = ["OTHER", "PARAMETER", "Flow", "flow_of", "same_random_numbers"]

OTHER = "other"
PARAMETER = "parameter"  # a use of a layer by its weight or bias
MOST_OPTIONS = 3  # of a forward, each combination of which is traced


class Flow:
    """What forwards showed. Its modules are those of the model, not of the copies that ran."""

    def __init__(self) -> None:
        self.inputs: defaultdict[nn.Module, set[Any]] = defaultdict(set)  # of a norm: layers that returned them, OTHER
        self.users: defaultdict[nn.Module, set[Any]] = defaultdict(set)  # of a layer's outputs: norms, OTHER, PARAMETER
        self.dims: defaultdict[nn.Module, set[int]] = defaultdict(set)  # of a norm's inputs, in an example's run
        self.reads: dict[nn.Module, str] = {}  # an attribute of a norm that something else reads
        self.known = False  # whether forwards could be followed
        self.unknown: dict[str, str] = {}  # why some could not

    def add(self, other: Flow) -> None:
        """Take over what another one showed."""
        for mine, others in ((self.inputs, other.inputs), (self.users, other.users), (self.dims, other.dims)):
            for module, found in others.items():
                mine[module] |= found


Layers = tuple[type[nn.Module], ...]


def flow_of(model: nn.Module, norms: Mapping[nn.Module, str], layers: Layers, example: Any) -> Flow:
    """Follow the forward of ``model`` in both modes: in traces, and on ``example`` if it is not None.

    Args:
        model: any module. Copies of it run, which share its parameters.
        norms: the batch norms in it.
        layers: types of the layers whose outputs are followed.
        example: a tensor, or tuple or mapping of arguments.
    """
    flow = Flow()
    ways: dict[str, Callable[..., Iterator[Watch]]] = {"Tracing the forward": _traces}
    if example is not None:
        ways["Following the forward on example_input, in both modes,"] = partial(_runs, example)
    for name, way in ways.items():
        found = Flow()
        try:
            with same_random_numbers(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of copies, which the user does not have
                for watch in way(partial(Watch, model, norms, layers, flow.reads)):
                    found.add(watch.flow)
        except Exception as error:  # the user's code runs, on fx proxies too
            lines = str(error).splitlines() or [""]
            flow.unknown[name] = f"{type(error).__name__}: {lines[0][:120]}"
        else:
            flow.known = True
            flow.add(found)
    return flow


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Seed the generators of the CPU and of the model's devices; set them back afterwards."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(0)
        yield


class Watch:
    """A copy of a model, in which calls of norms and layers are followed, and readings of their attributes."""

    def __init__(
        self,
        model: nn.Module,
        norms: Mapping[nn.Module, str],
        layers: Layers,
        reads: dict[nn.Module, str],
        training: bool,
    ) -> None:
        self.flow = Flow()
        self.reads = reads  # also of a forward that raises
        self.model = model_copy(model, shares_parameters=True)
        self.followed: dict[nn.Module, nn.Module] = {}  # of the copy: the model's own
        self.norms = set(norms)
        self.running: list[nn.Module] = []  # followed modules
        self.made: dict[int, tuple[nn.Module, weakref.ref[Tensor], Any]] = {}  # outputs of layers, by address
        self.taken: list[tuple[nn.Module, int | None]] = []  # norms that run, and the addresses of their inputs
        for copied, own in zip(self.model.modules(), model.modules(), strict=True):
            copied.training = training and own not in norms  # a batch of one sample has no statistics
            if own in norms or (isinstance(own, layers) and not any(inside in norms for inside in own.modules())):
                self.followed[copied] = own
        for copied, own in self.followed.items():
            self._follow(copied, own, own_names(own) if own in norms else {"weight", "bias"})

    def _follow(self, copied: nn.Module, own: nn.Module, names: set[str]) -> None:
        """Make ``copied`` tell when it is called, and when ``names`` of it are read by others."""
        kind, watch = type(copied), self

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            x = first_input(args, kwargs) if args or kwargs else None
            if isinstance(x, fx.Proxy) and own not in watch.running:
                return module(*args, **kwargs)  # called as a function: in a trace, too, the module is one step
            return watch.call(own, x, partial(kind.forward, module, *args, **kwargs))

        def read(module: nn.Module, name: str) -> Any:
            if name in names and own not in watch.running:
                watch.read(own, name)
            return kind.__getattribute__(module, name)

        copied.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__getattribute__": read})

    def read(self, module: nn.Module, name: str) -> None:
        """Note that something else reads an attribute of ``module``."""
        if module in self.norms:
            self.reads.setdefault(module, name)
        else:
            self.flow.users[module].add(PARAMETER)

    def call(self, module: nn.Module, x: Any, forward: Callable[[], Any]) -> Any:
        """Run the forward of a norm or a layer."""
        if module in self.norms:
            self._take(module, x)
        self.running.append(module)
        try:
            y = forward()
        finally:
            self.running.pop()
            if module in self.norms:
                self.taken.pop()
        address = _address(y)
        if module not in self.norms and address is not None:
            self.made[address] = module, weakref.ref(y), y.untyped_storage()  # kept: no other tensor gets its address
        return y

    def _take(self, norm: nn.Module, x: Any) -> None:
        address = _address(x)
        self.taken.append((norm, address))
        layer, output, _ = self.made.get(address or 0, (None, None, None))
        if layer is None or output is None or output() is not x:
            self.flow.inputs[norm].add(OTHER)
        else:
            self.flow.inputs[norm].add(layer)
            self.flow.users[layer].add(norm)
        if isinstance(x, Tensor):
            self.flow.dims[norm].add(x.dim())

    def use(self, tensors: list[Tensor]) -> None:
        """Note that an op takes ``tensors``."""
        for address in map(_address, tensors):
            if address in self.made and not (self.taken and self.taken[-1][1] == address):
                self.flow.users[self.made[address][0]].add(OTHER)

    def end(self) -> None:
        """End a forward whose output is still held: what is alive is the output, or kept for another use."""
        if any(output() is not None for _, output, _ in self.made.values()):
            gc.collect()
        for layer, output, _ in self.made.values():
            if output() is not None:
                self.flow.users[layer].add(OTHER)


def _address(x: Any) -> int | None:
    """Return where the memory of a tensor begins."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return None
    address = x.untyped_storage().data_ptr()
    if not address:
        raise ValueError("tensors on meta or without values have no addresses, by which they are followed")
    return address


def _runs(example: Any, watch_in: Callable[[bool], Watch]) -> Iterator[Watch]:
    for training in (False, True):
        watch = watch_in(training)
        with watching_ops(watch.use):
            output = run(watch.model, example)
        watch.end()
        del output
        yield watch


def _traces(watch_in: Callable[[bool], Watch]) -> Iterator[Watch]:
    """Trace the forward in both modes, with its optional arguments and without them, in each combination."""
    for training in (False, True):
        options = _options(watch_in(training).model)
        for given in product((True, False), repeat=len(options)):
            watch = watch_in(training)  # another copy: tracing may leave proxies in attributes
            left_out = {name: None for name, is_given in zip(options, given, strict=True) if not is_given}
            graph = _Tracer(watch.followed).trace(watch.model, concrete_args=left_out or None)
            _read_graph(graph, watch)
            yield watch


def _options(model: nn.Module) -> list[str]:
    """Return the arguments that are None unless given."""
    if "forward" in vars(model):
        raise ValueError(f"the forward of {type(model).__name__} is replaced on the object")
    options = [name for name, p in inspect.signature(model.forward).parameters.items() if p.default is None]
    if len(options) > MOST_OPTIONS:
        raise ValueError(f"the forward of {type(model).__name__} has {len(options)} optional arguments")
    return options


class _Tracer(fx.Tracer):
    """Traces the inside of modules that contain one that is followed, and no other."""

    def __init__(self, followed: Mapping[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.followed = followed

    def is_leaf_module(self, m: nn.Module, _name: str) -> bool:
        return m in self.followed or not any(inside in self.followed for inside in m.modules())


def _read_graph(graph: fx.Graph, watch: Watch) -> None:
    """Note what a traced forward does with norms and layers."""

    def module_of(node: fx.Node) -> nn.Module | None:
        return watch.followed.get(watch.model.get_submodule(str(node.target))) if node.op == "call_module" else None

    for node in graph.nodes:
        module = module_of(node)
        if module in watch.norms:
            sources = [module_of(source) for source in node.all_input_nodes]
            layer = sources[0] if len(sources) == 1 and sources[0] not in watch.norms else None
            watch.flow.inputs[module].add(layer or OTHER)
        elif module is not None:
            users = (module_of(user) for user in node.users)
            watch.flow.users[module] |= {user if user in watch.norms else OTHER for user in users}
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            owned = watch.followed.get(watch.model.get_submodule(owner))
            if owned is not None:
                watch.read(owned, name)

"""Removal of batch norm from a network, which afterwards computes what it did in evaluation."""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..torch_private import batch_norm_types, has_hooks
from .surgery import check_not_wrapped, replace, slots

__all__ = ["ChannelAffine", "remove_batch_norm"]

# Layers into which a batch norm can be folded, each with the batch norm of its dimensions (SyncBatchNorm takes any).
# Exact types: a parametrized, lazy or user's subclass may compute its weight anew in each forward.
FOLDABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}
BATCH_NORMS = batch_norm_types()


class ChannelAffine(nn.Module):
    """``y = weight * x + bias`` with a weight and a bias for each channel: a batch norm that was not folded.

    Takes ``(N, C, *spatial)`` with C = ``num_features``, and computes in its dtype, as a convolution does under
    autocast. ``device`` and ``dtype`` are those of the parameters, which start as 1 and 0.

    >>> import torch
    >>> ChannelAffine(3)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, num_features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Return ``weight * input + bias``; the argument has the name that batch norm gives it."""
        shape, dtype = (-1,) + (1,) * (input.ndim - 2), input.dtype
        return torch.addcmul(self.bias.to(dtype).view(shape), input, self.weight.to(dtype).view(shape))

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.num_features)


def remove_batch_norm(model: nn.Module) -> nn.Module:
    r"""Take every batch norm out of ``model``, in place; keep the function that it computes in evaluation.

    With the running statistics, batch norm is ``weight·(x - running_mean)/sqrt(running_var + eps) + bias``, an affine
    map of each channel. Where a batch norm is all that uses a convolution's or linear layer's output, the map is
    folded into that layer (which gets a bias if it had none) and the batch norm becomes ``nn.Identity``; elsewhere it
    becomes a :class:`~vcl_kernels.nn.batch_norm.ChannelAffine`. Names stay, and so do the layers' parameters as
    objects. Training and evaluation then compute the same, each sample for itself.

    The order of layers is read off the model's forward, traced with ``torch.fx`` in training and evaluation; no input
    is needed. If it cannot be traced, neighbours in an ``nn.Sequential`` are taken to be called one after the other,
    and other batch norms become affine maps. A linear layer's output is taken to be ``(N, C)``.

    Nothing is folded into layers with hooks, parametrizations or parameters that another module uses, nor a batch
    norm that learns into a frozen layer. The affine map or new bias of a batch norm that is frozen, or has
    ``affine=False``, does not learn either.

    Load checkpoints of the batch-norm network before; make optimizers and DistributedDataParallel after, because
    parameters come and go. A compiled model compiles itself again, but what ``torch.compile`` returns cannot be traced:
    give the module inside.

    Args:
        model: any module that holds BatchNorm1d, 2d, 3d or SyncBatchNorm. It is returned.

    Raises:
        ValueError: the model has no batch norm, is one itself, or is wrapped for distributed training (the wrapper
            would go on with the old parameters); a batch norm has no running statistics
            (``track_running_stats=False``, or lazy and never run), or hooks or a forward of its own, which would be
            lost. The model is then unchanged.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    >>> remove_batch_norm(net)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
      (3): ChannelAffine(8)
    )
    """
    norms = _batch_norms(model)
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))  # how many hold it
    inputs = _input_layers(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for norm in norms:
        layer = inputs.get(norm)
        if _can_fold(layer, norm, owners):
            _fold(layer, norm)
            replacements[norm] = nn.Identity().train(norm.training)
        else:
            replacements[norm] = _affine(norm).train(norm.training)
    replace(model, replacements)
    return model


def _batch_norms(model: nn.Module) -> list[Any]:
    """Return the batch norms of the model. Raise ValueError where one cannot be removed."""
    if isinstance(model, BATCH_NORMS):
        raise ValueError(f"model is itself a {type(model).__name__}, which cannot be replaced in place; give its owner")
    check_not_wrapped(model)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        raise ValueError(f"model ({type(model).__name__}) has no batch norm to remove")
    names = {module: name for name, module in model.named_modules()}
    for norm in norms:
        described = f"model has a {type(norm).__name__}, {names[norm]!r}, "
        if norm.running_mean is not None and is_lazy(norm.running_mean):
            raise ValueError(described + "that has not seen any input; run a forward first")
        if type(norm).forward not in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward) or not _is_plain(norm):
            raise ValueError(described + "with hooks or a forward of its own, which would be lost; replace it by hand")
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                described + "without running statistics (track_running_stats=False), so that what it computes depends "
                "on the batch; set its running_mean and running_var (zeros and ones keep weight and bias as they are)"
            )
    return norms


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    return not has_hooks(module) and "forward" not in vars(module)


class _Tracer(fx.Tracer):
    """Traces the inside of modules that contain a batch norm or a layer of FOLDABLE, and no other."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds = (*BATCH_NORMS, *FOLDABLE)
        contains = any(isinstance(module, kinds) for module in m.modules())
        return isinstance(m, kinds) or not contains or super().is_leaf_module(m, module_qualified_name)


def _input_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Map each module whose only input is the output of one other module, which nothing else uses, to that module."""
    try:
        nodes = [node for graph in _graphs(model) for node in graph.nodes]
    except Exception:  # tracing runs the user's code on fx proxies, which may raise anything
        return _predecessors(model)
    inputs: defaultdict[str, set[str]] = defaultdict(set)
    users: defaultdict[str, set[str]] = defaultdict(set)
    for node in nodes:
        inputs[_module_name(node)].update(map(_module_name, node.all_input_nodes))
        users[_module_name(node)].update(map(_module_name, node.users))
    only_inputs = {name: next(iter(sources)) for name, sources in inputs.items() if name and len(sources) == 1}
    pairs = [(name, source) for name, source in only_inputs.items() if users[source] == {name}]
    return {model.get_submodule(name): model.get_submodule(source) for name, source in pairs}


def _graphs(model: nn.Module) -> Iterator[fx.Graph]:
    """Trace the model's forward in both modes, with its optional arguments and without them."""
    # Tracing may leave proxies in attributes and write to buffers: trace a copy, which shares the parameters.
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    optional = {n: None for n, p in inspect.signature(model.forward).parameters.items() if p.default is None}
    for training in (True, False):
        for module in copied.modules():
            module.training = training
        yield _Tracer().trace(copied)
        if optional:
            yield _Tracer().trace(copied, concrete_args=optional)


def _module_name(node: fx.Node) -> str:
    """Return the module that a node calls, or whose parameter it reads, which counts as a use; else ``""``."""
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    return str(node.target) if node.op == "call_module" else ""


def _predecessors(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Map each module in an ``nn.Sequential`` to the one before it, where both stand in the model only once."""
    count = Counter(slots(model).values())
    pairs: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and _is_plain(module):
            pairs |= {second: first for first, second in pairwise(module) if count[first] == count[second] == 1}
    return pairs


def _can_fold(layer: Any, norm: Any, owners: Counter[nn.Parameter]) -> bool:
    """Whether ``norm`` can be folded into ``layer``, which then learns what ``norm`` learned."""
    if type(layer) not in FOLDABLE or not issubclass(type(norm), (FOLDABLE[type(layer)], nn.SyncBatchNorm)):
        return False
    if not _is_plain(layer) or any(owners[p] > 1 for p in layer.parameters()):
        return False
    for of_norm, of_layer in ((norm.weight, layer.weight), (norm.bias, layer.bias)):
        if _learns(of_norm) and of_layer is not None and not of_layer.requires_grad:
            return False
    weight = _output_first(layer, layer.weight)
    return len(weight) == norm.num_features and weight.device == norm.running_mean.device


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Make ``layer`` compute ``norm(layer(x))``. Its new values are computed in float32 at least, and rounded once."""
    weight = _output_first(layer, layer.weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(dtype).reshape(len(weight), -1)
    of_channels = (layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    wide: list[Any] = [None if t is None else t.to(dtype) for t in of_channels]
    b, mean, var, gamma, beta = wide
    w, b = fuse_conv_bn_weights(w, b, mean, var, norm.eps, gamma, beta)
    layer.weight.copy_(_output_first(layer, w.reshape(weight.shape)))
    if layer.bias is None:
        layer.bias = nn.Parameter(b.to(weight.dtype), requires_grad=_learns(norm.bias))
    else:
        layer.bias.copy_(b)


def _affine(norm: Any) -> ChannelAffine:
    """Return the affine map that a batch norm is in evaluation."""
    mean = norm.running_mean
    affine = ChannelAffine(len(mean), device=mean.device, dtype=mean.dtype)
    _fold(affine, norm)
    affine.weight.requires_grad_(_learns(norm.weight))
    affine.bias.requires_grad_(_learns(norm.bias))
    return affine


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _output_first(layer: Any, weight: Tensor) -> Tensor:
    """Swap a transposed convolution's ``(C_in, C_out/groups, ...)`` and ``(C_out, C_in/groups, ...)``, either way.

    ``fuse_conv_bn_weights(transpose=True)`` supports one group only.
    """
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)

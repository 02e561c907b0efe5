"""A batch-norm network turned into one without normalisation, which computes the same at the start."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .places import check_not_wrapped, replace

__all__ = ["ChannelAffine", "remove_batch_norm"]

# Layers that can take a batch norm in, and the batch norm whose channels are surely theirs (SyncBatchNorm goes with
# all). These very types: a parametrized, lazy or user's subclass may make its weight anew in each forward.
FOLDABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}


class ChannelAffine(nn.Module):
    """``y = weight * x + bias`` with one weight and bias for each channel: what batch norm leaves behind.

    Computed in x's dtype, as a convolution is under autocast.

    Args:
        num_features: C.
        device, dtype: of the parameters, which start as 1 and 0.

    Shape: any ``(N, C, *spatial)``, and the same for the output.

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
    r"""Take every batch norm out of ``model``, in place, and keep the function that it computes in evaluation.

    With the running statistics, batch norm is ``weight·(x - running_mean)/sqrt(running_var + eps) + bias``, an affine
    map of each channel. Where a batch norm is all that uses a convolution's or linear layer's output, the map is
    folded into that layer (which gets a bias if it had none) and the batch norm becomes ``nn.Identity``; elsewhere it
    becomes a :class:`~vcl_kernels.batch_norm.ChannelAffine`. Names stay, and so do the layers' parameters as objects.
    Training and evaluation then compute the same, each sample for itself.

    What follows what is read off the model's forward, traced with ``torch.fx`` (in training and evaluation; no input
    is needed). If it cannot be traced, neighbours in an ``nn.Sequential`` are taken to be called one after the other,
    and other batch norms become affine maps. A linear layer's output is taken to be ``(N, C)``.

    Not folded: layers with hooks, parametrizations or parameters that another module uses, and frozen layers before a
    batch norm that learns. What batch norm did not learn is not learned afterwards: the affine map (or the new bias)
    of a frozen batch norm is frozen, and that of one with ``affine=False`` too.

    Load checkpoints of the batch-norm network before, and make optimizers and DistributedDataParallel after, for
    parameters come and go. A model from ``torch.compile`` compiles itself again, but its wrapper cannot be traced:
    give the module inside.

    Args:
        model: any module that holds BatchNorm1d, 2d, 3d or SyncBatchNorm.

    Returns:
        ``model``.

    Raises:
        ValueError: no batch norm in the model; the model is one itself; a batch norm that has no running statistics
            to go by (``track_running_stats=False``, or lazy and never run), or hooks or a forward of its own, which
            would be lost; DistributedDataParallel, which would go on with the old parameters. The model is then
            unchanged.

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
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    before = _layers_before(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for norm in norms:
        layer = before.get(norm)
        if layer is not None and _can_fold(layer, norm, owners):
            _fold(layer, norm)
            replacements[norm] = nn.Identity()
        else:
            replacements[norm] = _affine(norm)
        replacements[norm].train(norm.training)
    replace(model, replacements)
    return model


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of the model, each known to be removable."""
    if isinstance(model, _BatchNorm):
        raise ValueError(f"model is itself a {type(model).__name__}, which cannot be replaced in place; give its owner")
    check_not_wrapped(model)
    norms = []
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        known = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        what = f"model has a {type(norm).__name__}, {name!r}, "
        if norm.running_mean is not None and is_lazy(norm.running_mean):
            raise ValueError(what + "that has not seen any input; run a forward first")
        if not known or not _is_plain(norm):
            raise ValueError(what + "with hooks or a forward of its own, which would be lost; replace it by hand")
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                what + "without running statistics (track_running_stats=False), so that what it computes depends on "
                "the batch; set its running_mean and running_var (zeros and ones keep weight and bias as they are)"
            )
        norms.append(norm)
    if not norms:
        raise ValueError(f"model ({type(model).__name__}) has no batch norm to remove")
    return norms


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward, and nobody looks on."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


# What precedes what.


class _Tracer(fx.Tracer):
    """Looks only into modules that hold a layer or batch norm: what others do inside does not matter here."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds: tuple[type[nn.Module], ...] = (_BatchNorm, *FOLDABLE)
        holds = any(isinstance(part, kinds) for part in m.modules())
        return isinstance(m, kinds) or not holds or super().is_leaf_module(m, module_qualified_name)


def _layers_before(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each module that takes one other module's output, of which it is the only user: that other module."""
    try:
        graphs = list(_graphs(model))
    except Exception:  # tracing runs any code of the user's on stand-ins for tensors, so anything may be raised
        return _neighbours(model)
    sources: dict[str, set[str]] = {}
    users: dict[str, set[str]] = {}
    for graph in graphs:
        for node in graph.nodes:
            sources.setdefault(_called(node), set()).update(map(_called, node.all_input_nodes))
            users.setdefault(_called(node), set()).update(map(_called, node.users))
    pairs = {}
    for name, given in sources.items():
        if name and len(given) == 1 and users.get(source := next(iter(given))) == {name}:
            pairs[model.get_submodule(name)] = model.get_submodule(source)
    return pairs


def _called(node: fx.Node) -> str:
    """The name of the module that a node calls or reads a parameter of (another use of that module); else ``""``."""
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    return str(node.target) if node.op == "call_module" else ""


def _graphs(model: nn.Module) -> Iterator[fx.Graph]:
    """The model's forward in both modes, with optional arguments given and not given."""
    # Tracing may leave stand-ins in attributes and write to buffers, hence a copy; it shares the parameters.
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    optional = {n: None for n, p in inspect.signature(model.forward).parameters.items() if p.default is None}
    for training in (True, False):
        for module in copied.modules():
            module.training = training
        yield _Tracer().trace(copied)
        if optional:
            yield _Tracer().trace(copied, concrete_args=optional)


def _neighbours(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each module's predecessor in an ``nn.Sequential``, for modules that have one place in the model."""
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    pairs: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward and "forward" not in vars(module):
            children = [child for child in module._modules.values() if child is not None]
            for first, second in pairwise(children):  # not children(), which leaves out what comes again
                if places[first] == places[second] == 1:
                    pairs[second] = first
    return pairs


# What takes the batch norm's place.


def _can_fold(layer: nn.Module, norm: _BatchNorm, owners: Counter[int]) -> bool:
    """Whether the layer can take the batch norm in, and still learns what the batch norm learned."""
    if type(layer) not in FOLDABLE or not isinstance(norm, (FOLDABLE[type(layer)], nn.SyncBatchNorm)):
        return False
    if not _is_plain(layer) or any(owners[id(p)] > 1 for p in layer.parameters()):
        return False
    for taken, takes in ((norm.weight, layer.weight), (norm.bias, layer.bias)):
        if taken is not None and taken.requires_grad and isinstance(takes, Tensor) and not takes.requires_grad:
            return False
    weight = _output_first(layer, layer.weight)  # type: ignore[arg-type]
    return len(weight) == norm.num_features and weight.device == norm.running_mean.device  # type: ignore[union-attr]


@torch.no_grad()
def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    """Make ``layer`` compute ``norm(layer(x))``."""
    old: nn.Parameter = layer.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
    new_weight, new_bias = _fused(_output_first(layer, old), bias, norm)
    old.copy_(_output_first(layer, new_weight))
    if bias is None:
        layer.bias = nn.Parameter(new_bias.to(old.dtype), requires_grad=_learns(norm.bias))
    else:
        bias.copy_(new_bias)


@torch.no_grad()
def _affine(norm: _BatchNorm) -> ChannelAffine:
    """The batch norm alone, as if after a layer of weight 1 for each channel."""
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    weight, bias = _fused(mean.new_ones(len(mean), 1), None, norm)
    affine = ChannelAffine(len(mean), device=mean.device, dtype=mean.dtype)
    affine.weight.copy_(weight[:, 0]).requires_grad_(_learns(norm.weight))
    affine.bias.copy_(bias).requires_grad_(_learns(norm.bias))
    return affine


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _fused(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight ``(C, ...)`` and bias ``(C,)`` with the batch norm in them; in float32 at least, to be rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensors = (weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    w, b, mean, var, gamma, beta = (None if t is None else t.detach().to(dtype) for t in tensors)
    assert w is not None
    assert mean is not None
    assert var is not None
    new_weight, new_bias = fuse_conv_bn_weights(w, b, mean, var, norm.eps, gamma, beta)
    return new_weight.detach(), new_bias.detach()


def _output_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """Swap a transposed convolution's ``(C_in, C_out/groups, ...)`` and ``(C_out, C_in/groups, ...)``, either way.

    ``fuse_conv_bn_weights(transpose=True)`` knows one group only.
    """
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)

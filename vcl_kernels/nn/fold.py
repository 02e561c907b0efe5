"""A batch norm in evaluation, folded into the layer before it or as an affine map of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from ..torch_private import dims_checked, has_hooks

__all__ = ["LAYERS", "NewValues", "modules_that_share", "new_values", "why_not_into"]

# Layers into which a batch norm can be folded, each with the number of dimensions of its output for a batch: there,
# its channels are those of the batch norm. Exact types: others may compute their weight in each forward.
FOLDABLE: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
SHAPES = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
LAYERS = tuple(FOLDABLE)


def why_not_into(layer: Any, norm: Any, dims: set[int], sharing: set[nn.Module]) -> str | None:
    """Return why ``norm`` cannot be folded into ``layer``, whose output it alone takes; None: it can.

    Args:
        dims: numbers of dimensions of that output that an example showed; empty without one.
        sharing: modules whose tensors lie in memory that others use.
    """
    if is_lazy(layer.weight):
        return "has no shape yet"
    if is_parametrized(layer):
        return "is parametrized"
    if type(layer) not in FOLDABLE:
        return f"is a {type(layer).__name__}, which may compute its weight in each forward"
    if has_hooks(layer) or "forward" in vars(layer):
        return "has hooks or a forward of its own"
    wanted = FOLDABLE[type(layer)]
    seen: set[int | None] = {*dims} or {dims_checked(norm)}
    if seen == {None}:
        return "has an output of unknown shape; an example_input shows it"
    if seen != {wanted}:
        return f"has another output than {SHAPES[wanted]}"
    if layer in sharing:
        return "shares memory with another module"
    for t in (layer.weight, layer.bias):
        if t is not None and type(t) is not nn.Parameter:
            return f"has a {type(t).__name__} for a parameter"
    for of_norm, of_layer in ((norm.weight, layer.weight), (norm.bias, layer.bias)):
        if _learns(of_norm) and of_layer is not None and not of_layer.requires_grad:
            return "is frozen, and the batch norm learns"
    weight = _output_first(layer, layer.weight)
    if len(weight) != norm.num_features:
        return f"has {len(weight)} channels, not {norm.num_features}"
    if weight.device != norm.running_mean.device:
        return f"is on {weight.device}, not {norm.running_mean.device}"
    return None


def modules_that_share(model: nn.Module) -> set[nn.Module]:
    """Return the modules of which a tensor lies in memory that another tensor uses too."""
    spans = []
    for module in model.modules():
        of_module = [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
        spans += [(*_span(t), module) for t in of_module if isinstance(t, Tensor) and not is_lazy(t)]
    found: set[nn.Module] = set()
    last: Any = None
    for device, begin, end, module in sorted(spans, key=lambda span: span[:2]):
        if last is not None and (device, begin) < last[:2]:
            found |= {module, last[2]}
        if last is None or (device, end) > last[:2]:
            last = (device, end, module)
    return found


def _span(t: Tensor) -> tuple[str, int, int]:
    """Return where ``t`` lies: its device, first byte, and the one behind its last."""
    if t.is_meta or t.layout != torch.strided:  # no address: it is shared where the object is
        return f"{t.device} {t.layout}", id(t), id(t) + 1
    begin = t.data_ptr()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return str(t.device), begin, begin + extent * t.element_size()


class NewValues(NamedTuple):
    """New values of a layer's parameters, or of an affine map's."""

    weight: Tensor
    bias: Tensor
    learns: tuple[bool, bool]  # whether weight and bias do, where they are new parameters


@torch.no_grad()
def new_values(norm: Any, layer: Any = None) -> NewValues:
    """Return what makes ``layer`` compute ``norm(layer(x))``; without a layer, the affine map that ``norm`` is.

    It is computed in float32 at least, and rounded once.
    """
    mean, var = norm.running_mean, norm.running_var
    weight = torch.ones_like(mean) if layer is None else _output_first(layer, layer.weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(dtype).reshape(len(weight), -1)
    of_channels = (None if layer is None else layer.bias, mean, var, norm.weight, norm.bias)
    wide: list[Any] = [None if t is None else t.to(dtype) for t in of_channels]
    b, mean, var, gamma, beta = wide
    w, b = fuse_conv_bn_weights(w, b, mean, var, norm.eps, gamma, beta)
    w, b = w.detach().reshape(weight.shape).to(weight.dtype), b.detach().to(weight.dtype)
    if layer is not None:
        w = torch.empty_like(layer.weight).copy_(_output_first(layer, w))  # in its memory format
    return NewValues(w, b, (_learns(norm.weight), _learns(norm.bias)))


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _output_first(layer: Any, weight: Tensor) -> Tensor:
    """Swap a transposed convolution's ``(C_in, C_out/groups, ...)`` and ``(C_out, C_in/groups, ...)``, either way.

    ``fuse_conv_bn_weights(transpose=True)`` supports one group only.
    """
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)

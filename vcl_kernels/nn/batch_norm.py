"""Removal of batch norm from a network, which afterwards computes what it did in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..torch_private import inside_compiled
from .affine import ChannelAffine
from .code import norm_in_code
from .doubts import check_not_wrapped_outside
from .flow import OTHER, PARAMETER, Flow, follow_example
from .fold import LAYERS, NewValues, modules_that_share, new_values, why_not_into
from .norms import batch_norms, norms_that_stay
from .parts import OriginalCalledError, Parts, Twins, error_text
from .same import check_outputs
from .table import aligned
from .trace import check_traces, follow_traces
from .wrappers import check_module, check_not_wrapped

__all__ = ["BatchNormRemoval", "RemovedBatchNorm", "remove_batch_norm"]

NORM_ATTRIBUTES = {*vars(nn.BatchNorm2d(1)), *vars(nn.SyncBatchNorm(1))}
MOST_CHARACTERS = 150  # of an error in a note


class RemovedBatchNorm(NamedTuple):
    """A batch norm that was removed."""

    batch_norm: str  # its name in the model
    type: str
    folded_into: str | None  # the name of a layer; None: it became a ChannelAffine
    reason: str  # why it was not folded, or ""


class BatchNormRemoval:
    """What :func:`remove_batch_norm` did, printed as a table: a row for each batch norm of the model, in its order.

    Attributes:
        model: the model.
        rows: a :class:`RemovedBatchNorm` each.
        notes: why forwards could not be followed or outputs not compared, and batch norms that stay.
    """

    def __init__(self, model: nn.Module, rows: list[RemovedBatchNorm], notes: list[str]) -> None:
        self.model, self.rows, self.notes = model, rows, notes

    def __repr__(self) -> str:
        lines = [("batch norm", "type", "became", "because")]
        for row in self.rows:
            became = "ChannelAffine" if row.folded_into is None else f"part of {row.folded_into!r}"
            lines.append((row.batch_norm, row.type, became, row.reason))
        folded = sum(row.folded_into is not None for row in self.rows)
        number = len(self.rows)
        summary = f"{number} batch norm{'s' * (number != 1)} removed: {folded} folded, {number - folded} affine"
        return "\n".join([aligned(lines), summary, *self.notes])


def remove_batch_norm(model: nn.Module, example_input: Any = None) -> BatchNormRemoval:
    r"""Take every batch norm out of ``model``, in place; keep the function that it computes in evaluation.

    With the running statistics, batch norm is ``weight·(x - running_mean)/sqrt(running_var + eps) + bias``, an affine
    map of each channel. Where a batch norm is all that uses a convolution's or linear layer's output, the map is
    folded into that layer (which gets a bias if it had none) and the batch norm becomes ``nn.Identity``; elsewhere it
    becomes a :class:`~vcl_kernels.nn.affine.ChannelAffine`. Names stay, and so do the modules and the layers'
    parameters as objects. In training, no sample depends on the others any more.

    A batch norm is folded only if a trace of the forward (``torch.fx``), or a run on ``example_input`` in which every
    operation is followed, shows that nothing else uses the layer's output; both in training and in evaluation, on
    copies. A branch that the example does not take is not checked. Where neither is to be had, batch norms become
    affine maps. With ``example_input`` the outputs before and after are compared too, in float64 on copies, before the
    model is changed. BatchNorm1d and SyncBatchNorm take several shapes, and only an example shows which, so that they
    are folded with one alone. See docs/batch_norm.md.

    Nothing is folded into layers with hooks, parametrizations or memory that other modules use, nor a batch
    norm that learns into a frozen layer. The affine map or new bias of a batch norm that is frozen, or has
    ``affine=False``, does not learn either.

    Load checkpoints of the batch-norm network before; make optimizers and DistributedDataParallel after, because
    parameters come and go. A compiled model compiles itself again.

    Args:
        model: any module that holds BatchNorm1d, 2d, 3d or SyncBatchNorm, or what ``torch.compile`` made of one.
        example_input: a tensor, or tuple or mapping of arguments, on which the model runs in both modes.

    Returns:
        What became of each batch norm, and why one was not folded: a :class:`BatchNormRemoval`, to be printed.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no batch norm, or is wrapped for distributed training (the wrapper would go on with
            the old parameters). A batch norm has no running statistics (``track_running_stats=False``, or lazy and
            never run), or hooks, a forward or parameters of its own, which would be lost. Something else reads its
            attributes. The output on ``example_input`` would change. The model is then unchanged.
        Exception: what the model raises on ``example_input``.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    >>> remove_batch_norm(net)
    batch norm  type         became         because
    1           BatchNorm2d  part of '0'
    3           BatchNorm2d  ChannelAffine  its input is not the output of a convolution or linear layer
    2 batch norms removed: 1 folded, 1 affine
    >>> net
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
      (3): ChannelAffine(8)
    )
    """
    check_module(model)
    check_not_wrapped(model)
    check_not_wrapped_outside(model)
    model = inside_compiled(model)
    norms = batch_norms(model)
    with torch.inference_mode(False):
        evidence = _follow(Parts(model, norms, LAYERS), example_input)
        _check_reads(evidence)
        names = {module: name for name, module in model.named_modules()}
        sharing = modules_that_share(model)
        plan: dict[Any, Any] = {}  # norms, each with the layer into which it is folded
        rows = []
        for norm, name in norms.items():
            layer, reason = _layer_for(norm, evidence, sharing, names)
            plan[norm] = layer
            kind = type(norm).__name__
            rows.append(RemovedBatchNorm(name or kind, kind, None if layer is None else names[layer], reason))
        notes = [*evidence.notes(), *_check_same(evidence, plan)]
        _apply(plan)
    notes += [
        f"Batch norms in {place} stay: they are not among the model's modules" for place in norms_that_stay(model)
    ]
    return BatchNormRemoval(model, rows, notes)


class Evidence(NamedTuple):
    """What forwards showed of a model."""

    parts: Parts
    example: Any
    flow: Flow | None  # None: neither traces nor the example could be followed
    traces: list[Any]  # the steps of each
    trace_error: str | None
    example_error: str | None

    def notes(self) -> list[str]:
        """Return why forwards could not be followed. A trace does not matter where an example tells."""
        errors = {
            "The forward cannot be traced": self.trace_error if self.flow is None or self.example is None else None,
            "The forward cannot be followed on example_input, in both modes": self.example_error,
        }
        notes = [f"{what}: {error}" for what, error in errors.items() if error is not None]
        if self.example is not None and self.trace_error is not None and self.flow is not None:
            notes.append(
                f"Seen on the example alone; branches that it does not take were not checked ({self.trace_error})"
            )
        return notes


def _follow(parts: Parts, example: Any) -> Evidence:
    """Follow the forward of a model, in traces and on ``example``."""
    traced, trace_error = _tried(partial(follow_traces, parts))
    seen, example_error = (None, None) if example is None else _tried(partial(follow_example, parts, example))
    of_traces, traces = traced or (None, [])
    flows = [flow for flow in (of_traces, seen) if flow is not None]
    for flow in flows[1:]:
        flows[0].add(flow)
    return Evidence(parts, example, flows[0] if flows else None, traces, trace_error, example_error)


def _tried(follow: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what ``follow`` returns, or None and the error: the user's code runs, on fx proxies too."""
    try:
        return follow(), None
    except Exception as error:
        of_ours = type(error) in (ValueError, OriginalCalledError)
        (text, *_) = (str(error) if of_ours else error_text(error)).splitlines()
        return None, text if len(text) < MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _check_reads(evidence: Evidence) -> None:
    """Raise ValueError where a forward reads attributes of a batch norm."""
    parts = evidence.parts
    described = f"the forward of model ({type(parts.model).__name__})"
    if parts.reads:
        norm, attribute = next(iter(parts.reads.items()))
        what = "calls methods" if callable(getattr(norm, attribute, None)) else f"reads {attribute!r}"
        raise ValueError(
            f"{described} {what} of {type(norm).__name__} {parts.norms[norm]!r}, and not only calls it as a module; "
            "replace that by hand. The model is unchanged"
        )
    if evidence.flow is None and evidence.example is None:
        found = norm_in_code(parts.model, parts.norms.items())
        if found:
            raise ValueError(
                f"{described} cannot be traced ({evidence.trace_error}), and {found}. Pass an example_input, on which "
                "it is tried. The model is unchanged"
            )


def _layer_for(
    norm: nn.Module, evidence: Evidence, sharing: set[nn.Module], names: Mapping[nn.Module, str]
) -> tuple[nn.Module | None, str]:
    """Return the layer into which ``norm`` is folded, or None and the reason."""
    flow = evidence.flow
    if flow is None:
        hint = "; an example_input may show it" if evidence.example is None else ""
        return None, f"the forward could not be followed{hint}"
    inputs = flow.inputs.get(norm, set())
    if not inputs:
        return None, "no forward that was followed calls it"
    if OTHER in inputs:
        return None, "its input is not the output of a convolution or linear layer"
    if len(inputs) > 1:
        return None, "its inputs come from several layers"
    (layer,) = inputs
    described = f"{type(layer).__name__} {names[layer]!r}"
    if PARAMETER in flow.users[layer]:
        return None, f"a forward reads the parameters of {described}"
    if flow.users[layer] != {norm}:
        return None, f"the output of {described} has other uses"
    reason = why_not_into(layer, norm, flow.dims[norm], sharing)
    return (layer, "") if reason is None else (None, f"{described} {reason}")


def _check_same(evidence: Evidence, plan: Mapping[Any, Any]) -> list[str]:
    """Raise ValueError if the forward of a copy changes by more than rounding. Return what could not be compared."""

    def change(twins: Twins) -> None:
        _apply({twins[norm]: None if layer is None else twins[layer] for norm, layer in plan.items()})

    changed = "its batch norms are removed"
    if evidence.example is not None:
        note = check_outputs(evidence.parts, evidence.example, change, changed)
        return [] if note is None else [note]
    if evidence.flow is not None:
        check_traces(evidence.parts, evidence.traces, change, changed)
    return []


def _apply(plan: Mapping[Any, Any]) -> None:
    """Change a model: compute all new values first, then put them where they belong."""
    values = {norm: new_values(norm, layer) for norm, layer in plan.items()}
    for norm, new in values.items():
        layer = plan[norm]
        if layer is None:
            _become(norm, _affine(new))
            continue
        _set_values(layer.weight, new.weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(new.bias, requires_grad=new.learns[1])
        else:
            _set_values(layer.bias, new.bias)
        _become(norm, nn.Sequential() if dict(norm.named_children()) else nn.Identity())
    torch.clear_autocast_cache()  # inside of an autocast region it holds the old weights


def _set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter new values, in new memory: views of the old one keep its values."""
    parameter.data = values
    parameter.grad = None  # that of the old values


def _affine(new: NewValues) -> ChannelAffine:
    affine = ChannelAffine(len(new.weight), device="meta")
    affine.weight = nn.Parameter(new.weight, requires_grad=new.learns[0])
    affine.bias = nn.Parameter(new.bias, requires_grad=new.learns[1])
    return affine


def _become(norm: nn.Module, other: nn.Module) -> None:
    """Make ``norm`` what ``other`` is, with its children and the attributes that a user gave it.

    It stays the same object, in whatever holds it.
    """
    other.training = norm.training
    for name, child in norm.named_children():
        other.add_module(name, child)
    of_users = {name: value for name, value in vars(norm).items() if name not in NORM_ATTRIBUTES}
    attributes = norm.__dict__
    object.__setattr__(norm, "__class__", type(other))
    attributes.clear()
    attributes.update(other.__dict__ | of_users)

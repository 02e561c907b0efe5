"""VCL on an existing model: in, before or behind its modules, without a change of the model's own names."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from torch import Tensor, nn

from ..checks import check_number
from ..options import BackendName, BetaMode, Form, Unit
from ..torch_private import tensors_in
from .beta import Fit, check_same_in_training
from .choose import Choice, Layers, choose
from .doubts import check_not_wrapped_outside, scripted_activations, tell_backend, tell_rows
from .handle import VCLHandle
from .layout import Layout
from .modules import VCL
from .probe import Probed, probe
from .recognise import Recognised, UnknownError, is_activation, recognise
from .steering import Steering
from .table import LEFT_OUT, Row
from .wrappers import check_module, check_not_wrapped

__all__ = ["attach"]

REMEDY_FOR_FUNCTIONS = (
    "Make them modules (self.act = nn.ReLU() in __init__). Where after= is shown, VCL of that layer's output does too"
)
REMEDY_FOR_STRANGERS = (
    "Make them attributes of a module, put them into nn.ModuleList or nn.ModuleDict, or use after= where it is shown"
)


def attach(  # noqa: PLR0913  # the public signature
    model: nn.Module,
    example_input: Any = None,
    *,
    weight: float = 0.01,
    sub_batch_size: int = 5,
    form: Form = "ratio",
    unit: Unit = "activation",
    num_sub_batches: int | None = None,
    beta_mode: BetaMode | None = None,
    beta_init: float | Literal["example"] | None = None,
    beta_momentum: float | None = None,
    beta_min: float = 1e-3,
    layers: Layers | None = None,
    after: Layers | None = None,
    shared_beta: bool = False,
    inject: bool = False,
    channel_dim: int | None = None,
    backend: BackendName | None = None,
) -> VCLHandle:
    r"""Give every activation module of ``model`` the variance constancy loss of its input, in place.

    A module without children is an activation if it keeps the shape of a tensor, maps each value by itself, the same at
    each call, and not as an affine function: torch.nn's, and those of transformers, timm and others. Where values and
    derivatives are those of ReLU, LeakyReLU, ELU, GELU, SiLU or Tanh, the two are fused (:class:`VCLActivation`);
    before others a VCL is hooked. Gates count too: the sigmoid of a squeeze-and-excitation block, the SiLU of a gated
    linear unit. ``print(handle)`` shows what each layer got.

    By default each unit's variance is pulled to about 1 (``unit="activation"``, beta fixed at 1), and no parameter is
    added. A beta that is learned, running or from the example is ``<name>.vcl.<call>.beta``. No name of the model's own
    changes. Evaluation is the plain model.
    In training, activations with ``inplace=True`` run out of place: VCL's gradient needs what they would overwrite.
    The output of ReLU, Tanh, and here of ELU and LeakyReLU, may be what is saved for backward: a module that changes it
    in place (``nn.Dropout(inplace=True)``) is then an autograd error. An input that needs no gradient (of a frozen
    part) gets no VCL.

    Args:
        model: any module. Activations that its forward calls as functions (``F.relu``) cannot get VCL: make them
            modules (``self.act = nn.ReLU()``), or name the layers whose outputs they take in ``after``.
        example_input: a tensor, or tuple or mapping of arguments, for one evaluation forward (nothing is learnt from
            it; two more are run if activations work in place). It shows modules called more than once, those whose
            channels are last, activations called as functions, and the shapes of learned betas. Activations of fewer
            than two dimensions get no VCL. Without it, or where it does not reach, learned betas get their shape in the
            first training forward: make the optimizer after that.
        weight: multiplies the sum over layers; ``handle.weight`` may change it.
        sub_batch_size, form, unit, num_sub_batches, beta_mode, beta_init, beta_momentum, beta_min: as for
            :class:`vcl_kernels.VCL`. ``beta_init="example"``: in each layer beta starts where the ratio is least for
            the variance that the example has there. The example is then a batch of training data.
        layers: modules whose *input* gets VCL, instead of all activations: names (as ``handle.layers`` has them) or
            modules, or a predicate of (name, module).
        after: layers whose *output* gets VCL, in addition to ``layers`` or the activations; with ``layers=[]``, only
            these. An activation that is named here has VCL of its output instead of its input.
        shared_beta: one beta for all calls of a module in a forward, whose losses are added: for a recurrent network
            of any length. Otherwise each call in the example gets its own beta.
        inject: the loss enters the graph through each layer's output, which must then not be changed in place, and
            the training loop needs no change. Under a ``torch.amp.GradScaler``, set ``handle.grad_scaler`` to it. If
            the objective is divided by k to add the gradients of k batches, set ``handle.accumulation = k``.
        channel_dim: the dimension of channels; that of samples is 0. None: chosen by the example. -1 for
            ``(N, L, C)`` that comes from a linear function or a norm over the last dimension, is made of such tensors
            without a change of shape, or is a part of one (a gate); else 1. The table shows it.
        backend: as for :func:`vcl_kernels.vcl_loss`.

    Returns:
        A :class:`VCLHandle`: ``handle.loss()`` to add to the objective, unless ``inject``. :func:`handle_of` finds that
        of a model, a copy or a wrapper.

    Warns:
        VCLWarning: VCL has no effect in some place, or one that is probably not wanted. Now: activations that are
            functions, or modules outside of the model; a dimension 0 that is no batch. In training: too few rows, a
            loss that is never read, betas in no optimizer, and others. Once for each handle and kind.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no activation module, a layer that does not exist or is a container, a model that has VCL attached
            already, is wrapped for distributed training (wrap it afterwards, so that its betas take part), or relies
            on what in-place activations leave in their inputs.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
    >>> handle = attach(net, torch.randn(2, 4))
    >>> print(handle)
    layer  activation  vcl    beta
    1      ELU         fused  1
    1 layer with VCL: 1 fused
    >>> objective = net(torch.randn(32, 4)).square().mean() + handle.loss()
    >>> objective.backward()
    """
    check_module(model)
    check_number("weight", weight)
    settings: dict[str, Any] = {
        "sub_batch_size": sub_batch_size,
        "form": form,
        "unit": unit,
        "num_sub_batches": num_sub_batches,
    }
    from_example = beta_init == "example"
    settings |= {"beta_mode": beta_mode, "beta_init": None if from_example else beta_init}
    settings |= {"beta_momentum": beta_momentum, "beta_min": beta_min, "backend": backend}
    if isinstance(beta_init, str) and not from_example:
        raise ValueError(f'beta_init must be a number or "example"; got {beta_init!r}')
    # Raises before the model is changed
    mode = VCL(**settings, channel_dim=1 if channel_dim is None else channel_dim).beta_mode
    if from_example and (form != "ratio" or mode == "running" or example_input is None):
        raise ValueError(
            'beta_init="example" wants an example_input, form="ratio" and a beta_mode of "learned" or "fixed"; got '
            f"{'no' if example_input is None else 'an'} example_input, form={form!r}, beta_mode={mode!r}"
        )
    if from_example:
        check_same_in_training(model)
    if mode != "fixed" or from_example:
        check_not_wrapped(model)
        check_not_wrapped_outside(model)
    _check_not_attached(model)
    steering = Steering(inject, attached=True, weight=weight)
    choice = choose(model, layers, after)
    probed, functions = None, []
    if example_input is not None:
        fit = Fit(model, sub_batch_size, unit, num_sub_batches, channel_dim) if from_example else None
        probed, choice = _probe(model, choice, example_input, fit)
    made = Layout(settings, channel_dim, shared_beta, steering)
    for name, module in choice.before.items():
        made.add(name, module, probed, choice.recognised.get(module), named=layers is not None)
    for name, module in choice.behind.items():
        made.add(name, module, probed, None, behind=True)
    if from_example and made.missed:
        raise ValueError(
            f'beta_init="example" wants an example that reaches every layer; it does not reach {_few(made.missed)}'
        )
    if probed is not None:
        functions = made.add_unreachable(model, probed, choice)
    scripted = {} if layers is not None else scripted_activations(model)
    made.rows += [Row(name, kind, LEFT_OUT, "compiled by torch.jit") for name, kind in scripted.items()]
    if not made.calls:
        raise ValueError(_why_no_layers(model, made, functions))
    if scripted:
        steering.warn(
            "scripted",
            f"torch.jit compiled {_few(list(scripted))}, and activations in them get no VCL. Attach before "
            "torch.jit.script, or name the layers whose outputs get VCL with after=",
        )
    if probed is not None:
        _tell(made, probed, functions if layers is None else [], choice)
    tell_backend([*model.parameters(), *tensors_in(example_input)], backend, steering.warn)
    undo = [undo for put in made.put for undo in put()]
    return VCLHandle(model, made.calls, steering, made.rows, undo)


def _check_not_attached(model: nn.Module) -> None:
    attached = next((name for name, module in model.named_modules() if hasattr(module, "vcl_handle")), None)
    if attached is not None:
        where = f" in its submodule {attached!r}" if attached else ""
        raise ValueError(f"model has VCL attached already{where}; call vk.handle_of(model).remove() first")


def _probe(model: nn.Module, choice: Choice, example: Any, fit: Fit | None) -> tuple[Probed, Choice]:
    """Run the example. Recognise the modules that only take what they get there."""
    before = [*choice.before.values(), *choice.unknown.values()]
    in_place = [
        module
        for module in choice.before.values()
        if getattr(module, "inplace", False) or (module in choice.recognised and choice.recognised[module].in_place)
    ]
    probed = probe(model, before, list(choice.behind.values()), in_place, example, fit)
    found: dict[nn.Module, Recognised] = {}
    for module in choice.unknown.values():
        for call in probed.calls.get(module, [])[:1]:
            if isinstance(call.x, Tensor) and call.inputs == 1:
                with suppress(UnknownError):
                    recognised = recognise(module, call.x)
                    found |= {} if recognised is None else {module: recognised}
    late = {name: module for name, module in choice.unknown.items() if module in found}
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    both = sorted({**choice.before, **late}.items(), key=lambda item: order[item[0]])
    return probed, choice._replace(before=dict(both), recognised={**choice.recognised, **found})


def _why_no_layers(model: nn.Module, made: Layout, functions: list[str]) -> str:
    name = type(model).__name__
    if next(model.children(), None) is None and is_activation(model):
        return f"model is one activation ({name}); attach to the model around it, or use vcl_kernels.VCLActivation"
    if functions:
        return (
            f"model ({name}) has no activation modules: its activations are functions: {_few(functions)}. "
            f"{REMEDY_FOR_FUNCTIONS}"
        )
    left_out = [f"{row.activation if row.layer == '-' else row.layer}: {row.beta}" for row in made.rows]
    if left_out:
        remedy = f". {REMEDY_FOR_STRANGERS}" if made.strangers else ""
        return f"model ({name}) has no activation that can have VCL; left out are {_few(left_out)}{remedy}"
    return (
        f"model ({name}) has no activation modules. Pass an example_input to find activations that are called as "
        "functions, or name layers whose outputs get VCL with after="
    )


def _tell(made: Layout, probed: Probed, functions: list[str], choice: Choice) -> None:
    """Tell what VCL does not reach, though the example shows it or it is in the model."""
    tell = made.steering.warn
    if made.missed:
        tell(
            "unreached",
            f"the example does not reach {', '.join(made.missed)}. Betas there get a shape in the first training "
            "forward that does; make the optimizer after that. To leave them out, list the other layers in layers=",
        )
    if functions:
        total = len(functions) + sum(len(probed.calls.get(module, [])) for module in choice.before.values())
        tell(
            "functions",
            f"{len(functions)} of {total} activation calls are functions, and get no VCL: {_few(functions)}. "
            f"{REMEDY_FOR_FUNCTIONS}. Name all layers in layers= to accept this",
        )
    if made.strangers:
        tell(
            "strangers",
            f"the forward calls activation modules that are not in the model: {_few(made.strangers)}. They get no VCL; "
            f"nor do model.to(), state_dict() and train() reach them. {REMEDY_FOR_STRANGERS}",
        )
    tell_rows(made.reached, probed.rows, tell)


def _few(texts: list[str]) -> str:
    different = list(dict.fromkeys(texts))
    return ", ".join(different[:6]) + f" and {len(different) - 6} more" * (len(different) > 6)

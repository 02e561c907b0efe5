"""VCL on an existing model: in or before every activation module, without a change of the model's own names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .fused import Calls, FusedActivation, before_activation, can_fuse, vcl_for
from .modules import VCL, VCLActivation
from .probe import Call, probe
from .surgery import check_not_wrapped, replace

__all__ = ["ACTIVATIONS", "VCLHandle", "attach", "param_groups"]

# fmt: off
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign,
)
# fmt: on


def attach(  # noqa: PLR0913  # the public signature
    model: nn.Module,
    example_input: Any = None,
    *,
    weight: float = 0.01,
    sub_batch_size: int = 5,
    form: str = "ratio",
    unit: str = "channel",
    num_sub_batches: int | None = None,
    learn_beta: bool = True,
    beta_init: float = 1.0,
    beta_min: float = 1e-3,
    layers: Iterable[str | nn.Module] | Callable[[str, nn.Module], bool] | None = None,
    inject: bool = False,
    channel_dim: int | None = None,
) -> VCLHandle:
    r"""Give every activation module of ``model`` the variance constancy loss of its input, in place.

    ReLU, LeakyReLU, ELU, GELU, SiLU and Tanh are replaced by modules that fuse the two (:class:`VCLActivation`);
    before other activations, and other modules chosen by ``layers``, a VCL is hooked. Parameters gain
    ``<name>.vcl.<call>.beta``, and no name of the model's own changes. Evaluation is the plain model: the very
    modules that it had. Activations with ``inplace=True`` are run out of place in training: VCL's gradient needs
    what they would overwrite. The output of ReLU, Tanh, and here of ELU and LeakyReLU, may be what is saved for
    backward: a module that changes it in place (``nn.Dropout(inplace=True)``) is then an autograd error.

    Args:
        model: any module. Activations called as functions (``F.relu``) are not seen: make them modules
            (``self.act = nn.ReLU()``), call :func:`vcl_kernels.vcl_activation` instead, or name the layers behind
            which they stand with ``layers``.
        example_input: a tensor, or tuple or mapping of arguments, for one evaluation forward (nothing is learnt from
            it; a second one is without in-place activations, if there are any) that finds the shape of each beta,
            activations called more than once, and those whose channels are last. Activations of fewer than two
            dimensions get no VCL. None, or an activation that the example does not reach: shapes come from the first
            training forward, after which the optimizer is to be made.
        weight: multiplies the sum over layers.
        sub_batch_size, form, unit, num_sub_batches, learn_beta, beta_init, beta_min: as for :class:`vcl_kernels.VCL`.
        layers: other places: names or modules before which VCL is put, or a predicate of (name, module).
        inject: the loss enters the graph through each layer's output, which must then not be changed in place, and
            the training loop needs no change. Under a ``torch.amp.GradScaler``, set ``handle.grad_scaler`` to it.
        channel_dim: where activations have their channels, dimension 0 being that of samples. None: in the last
            dimension of what ``example_input`` shows to come from a linear function or a norm over that dimension, or
            to be made of such tensors without a change of shape, or a part of one (as in a transformer's feed-forward
            layers, ``(N, L, C)``), or to enter a linear layer that ``layers`` names; else in dimension 1. The model's
            repr shows it.

    Returns:
        A :class:`VCLHandle`: ``handle.loss()`` to add to the objective, unless ``inject``. It is ``model.vcl_handle``
        too, as that of a copy is the copy's.

    Raises:
        ValueError: no activation module, a layer that does not exist or is a container, a model that has VCL attached
            already, is wrapped for distributed training (wrap it afterwards, so that its betas take part), or relies
            on what in-place activations leave in their inputs.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
    >>> handle = attach(net, torch.randn(2, 4))
    >>> objective = net(torch.randn(32, 4)).square().mean() + handle.loss()
    >>> objective.backward()
    """
    settings = {name: value for name, value in locals().items() if name not in ("model", "example_input", "layers")}
    if learn_beta and form != "variance":
        check_not_wrapped(model)
    attached = next((name for name, module in model.named_modules() if hasattr(module, "vcl_handle")), None)
    if attached is not None:
        where = f"its submodule {attached!r}" if attached else "it"
        raise ValueError(f"model has VCL attached already, to {where}; remove() that first (model.vcl_handle)")
    settings["channel_dim"] = 1 if channel_dim is None else channel_dim
    VCL(**settings)  # raises for a wrong setting before the model is changed
    modules = _chosen(model, layers)
    calls: dict[nn.Module, list[Call]] = {}
    if example_input is not None:
        calls = probe(model, list(modules.values()), example_input)
        missed = [name for name, module in modules.items() if module not in calls]
        if missed:
            warnings.warn(
                f"the example does not reach {', '.join(missed)}; a beta there has no shape before the first training "
                "forward that does. layers= leaves places out",
                stacklevel=2,
            )
    vcls: dict[str, list[VCLActivation]] = {}
    for name, module in modules.items():
        if all(x.dim() > 1 for x, _ in calls.get(module, ())):
            vcls[name] = [] if module in calls else [vcl_for(module, settings)]
            for x, probed_dim in calls.get(module, ()):
                dim = probed_dim if channel_dim is None else channel_dim
                vcls[name].append(vcl_for(module, {**settings, "channel_dim": dim}))
                vcls[name][-1].materialize(x)
    if not vcls:
        raise ValueError("model has no activation of two or more dimensions (N, C, …)")
    return VCLHandle(model, {name: (modules[name], Calls(of_module)) for name, of_module in vcls.items()})


class VCLHandle:
    """What :func:`attach` returns: the loss of the latest training forward, and the way back."""

    def __init__(self, model: nn.Module, layers: dict[str, tuple[nn.Module, Calls]]) -> None:
        self.model = model
        self._names, self._calls = list(layers), [calls for _, calls in layers.values()]
        self._before = [module for module, _ in layers.values() if not can_fuse(module)]  # their VCL comes before them
        self._inplace = [module for module in self._before if getattr(module, "inplace", False)]
        self._hooks = []
        replacements: dict[nn.Module, nn.Module] = {}
        for module, calls in layers.values():
            if can_fuse(module):
                replacements[module] = FusedActivation(module, calls)
            else:
                module.vcl = calls.train(module.training)
                self._hooks.append(module.register_forward_pre_hook(before_activation, with_kwargs=True))
        self._replaced = replace(model, replacements)
        for module in self._inplace:
            module.inplace = False  # type: ignore[assignment]
        model.vcl_handle = self  # type: ignore[assignment]  # a copy of the model has the copied handle
        self._hooks.append(model.register_forward_pre_hook(self._before_forward))
        self._hooks.append(model.register_forward_hook(self._after_forward, always_call=True))

    def _vcls(self) -> Iterator[tuple[str, VCLActivation]]:
        for name, calls in zip(self._names, self._calls, strict=True):
            for call, vcl in enumerate(calls):
                yield (name if call == 0 else f"{name}:{call}"), vcl  # type: ignore[misc]

    def _before_forward(self, model: nn.Module, _args: tuple[Any, ...]) -> None:
        if model.training:
            for calls in self._calls:
                calls.begin()

    def _after_forward(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        for calls in self._calls:
            calls.end()

    def __repr__(self) -> str:
        """Name the layers."""
        return f"VCLHandle({', '.join(self._names)})"

    def loss(self) -> Tensor:
        """Return ``weight`` times the sum over layers of the latest training forward's losses.

        Raises:
            RuntimeError: no training forward was run, or only without grad mode, so that the loss has no gradient.
        """
        ran = [vcl.latest for _, vcl in self._vcls() if vcl.loss is not None]
        if not ran:
            raise RuntimeError("handle.loss() wants a training forward of the model first (model.train())")
        if torch.is_grad_enabled() and not any(latest.in_grad_mode for latest in ran):
            raise RuntimeError(
                "handle.loss() has no gradient: the training forward ran without grad mode, under torch.no_grad() "
                "(read handle.losses then) or reentrant checkpointing (use_reentrant=False or inject=True helps)"
            )
        losses = [latest.loss for latest in ran if latest.loss is not None]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    @property
    def losses(self) -> dict[str, Tensor]:
        """Each layer's part of :meth:`loss`, detached, by the activation's name (``name:1`` for a second call)."""
        return {name: vcl.loss.detach() for name, vcl in self._vcls() if vcl.loss is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the learned betas, which are among ``model.parameters()`` too."""
        for _, vcl in self._vcls():
            yield from vcl.parameters()

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler that scales the objective, for ``inject=True``."""
        return next((vcl.grad_scaler for _, vcl in self._vcls()), None)

    @grad_scaler.setter
    def grad_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        for _, vcl in self._vcls():
            vcl.grad_scaler = scaler

    def remove(self) -> None:
        """Restore the model: its own activation modules, no hooks, no betas, in place again where they were."""
        if not self._hooks:
            return  # removed before
        for hook in self._hooks:
            hook.remove()
        for parent, name, fused in self._replaced:
            if getattr(parent, name, None) is fused:  # the user may have put another module there since
                assert isinstance(fused, FusedActivation)
                parent.register_module(name, fused.release())
        for module in self._before:
            if hasattr(module, "vcl"):
                del module.vcl
        for module in self._inplace:
            module.inplace = True  # type: ignore[assignment]
        del self.model.vcl_handle
        self._names, self._calls, self._before, self._inplace, self._hooks, self._replaced = [], [], [], [], [], []


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups in which biases and the betas of VCL are not decayed, and all else is.

    >>> net = nn.Sequential(nn.Linear(4, 8), VCL(8), nn.ELU())
    >>> [len(group["params"]) for group in param_groups(net, 1e-4)]
    [1, 2]
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    visited: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in visited:
                visited.add(id(parameter))
                is_bias = name.startswith("bias") or name.endswith("bias")  # an LSTM has bias_ih_l0
                (free if is_bias or isinstance(module, VCLActivation) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _chosen(
    model: nn.Module, layers: Iterable[str | nn.Module] | Callable[[str, nn.Module], bool] | None
) -> dict[str, nn.Module]:
    """The modules that get a VCL, by name."""
    modules: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, VCLActivation) and "parametrizations" not in name.split(".")
    }
    chosen: dict[str, nn.Module] = {}
    if layers is None:
        chosen = {name: module for name, module in modules.items() if isinstance(module, ACTIVATIONS)}
        if not chosen:
            raise ValueError(
                f"model ({type(model).__name__}) has no activation modules; name the layers before which VCL belongs "
                "with layers=, or put vcl_kernels.VCL into its forward"
            )
    elif callable(layers):
        chosen = {name: module for name, module in modules.items() if layers(name, module)}
    else:
        names = {module: name for name, module in modules.items()}
        for layer in layers:
            name = layer if isinstance(layer, str) else names.get(layer, "")
            if name not in modules:
                raise ValueError(f"layers must name modules of the model; got {layer!r}")
            chosen[name] = modules[name]
    if not chosen:
        raise ValueError("layers must choose at least one module of the model; it chose none")
    for name, module in chosen.items():
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"layers must not name a container; {name!r} is one: name a module inside it")
        if hasattr(module, "vcl"):
            raise ValueError(
                f"{name!r} has an attribute 'vcl' already, the name that attach sets: from another attach, perhaps. "
                "Choose other modules with layers="
            )
    return chosen

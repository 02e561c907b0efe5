"""VCL on an existing model: in or before every activation module, without a change of the model's own names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .fused import Calls, FusedActivation, before_activation, can_fuse, vcl_for
from .modules import VCL, VCLActivation
from .probe import probe
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
            it; a second one is without in-place activations, if there are any). It shows the shape of each beta,
            activations called more than once, and those whose channels are last. Activations of fewer than two
            dimensions get no VCL. Without it, or where it does not reach, betas get their shape in the first training
            forward: make the optimizer after that.
        weight: multiplies the sum over layers.
        sub_batch_size, form, unit, num_sub_batches, learn_beta, beta_init, beta_min: as for :class:`vcl_kernels.VCL`.
        layers: other places: names or modules before which VCL is put, or a predicate of (name, module).
        inject: the loss enters the graph through each layer's output, which must then not be changed in place, and
            the training loop needs no change. Under a ``torch.amp.GradScaler``, set ``handle.grad_scaler`` to it.
        channel_dim: the dimension of channels; that of samples is 0. None: the last dimension of activations
            ``(N, L, C)`` that, as ``example_input`` shows, come from a linear function or a norm over that dimension,
            are made of such tensors without a change of shape, are a part of one (a gate), or enter a linear layer
            that ``layers`` names; else dimension 1. The model's repr shows it.

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
    settings["channel_dim"] = 1 if channel_dim is None else channel_dim
    if learn_beta and form != "variance":
        check_not_wrapped(model)
    attached = next((name for name, module in model.named_modules() if hasattr(module, "vcl_handle")), None)
    if attached is not None:
        where = f"its submodule {attached!r}" if attached else "it"
        raise ValueError(f"model has VCL attached already, to {where}; remove() that first (model.vcl_handle)")
    VCL(**settings)  # raises for a wrong setting before the model is changed
    modules = _chosen(model, layers)
    probed = {} if example_input is None else probe(model, list(modules.values()), example_input)
    missed = [name for name, module in modules.items() if module not in probed]
    if missed and example_input is not None:
        warnings.warn(
            f"the example does not reach {', '.join(missed)}; a beta there has no shape before the first training "
            "forward that does. layers= leaves places out",
            stacklevel=2,
        )
    vcls: dict[str, Calls] = {}
    for name, module in modules.items():
        if module not in probed:
            vcls[name] = Calls([vcl_for(module, settings)])
        elif all(call.x.dim() > 1 for call in probed[module]):
            vcls[name] = Calls(
                vcl_for(module, {**settings, "channel_dim": channel_dim or call.channel_dim}).materialize(call.x)
                for call in probed[module]
            )
    if not vcls:
        raise ValueError("model has no activation of two or more dimensions (N, C, …)")
    return VCLHandle(model, modules, vcls)


class VCLHandle:
    """What :func:`attach` returns: the loss of the latest training forward, and the way back."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], vcls: dict[str, Calls]) -> None:
        self.model, self._calls = model, vcls
        self._undo: list[Callable[[], Any]] = []  # what remove() calls; all of it can be copied and pickled
        fused: dict[nn.Module, FusedActivation] = {}
        for name, calls in vcls.items():
            module = modules[name]
            if can_fuse(module):
                fused[module] = FusedActivation(module, calls)
                continue
            module.vcl = calls.train(module.training)
            hook = module.register_forward_pre_hook(before_activation, with_kwargs=True)
            self._undo += [hook.remove, partial(_delete_vcl, module)]
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
                self._undo.append(partial(setattr, module, "inplace", True))
        self._undo += [partial(_restore_original, *replaced) for replaced in replace(model, fused)]
        model.vcl_handle = self  # type: ignore[assignment]  # a copy of the model has the copied handle
        before = model.register_forward_pre_hook(self._before_forward)
        after = model.register_forward_hook(self._after_forward, always_call=True)
        self._undo += [before.remove, after.remove, partial(delattr, model, "vcl_handle")]

    def _before_forward(self, model: nn.Module, _args: tuple[Any, ...]) -> None:
        if model.training:
            for calls in self._calls.values():
                calls.begin()

    def _after_forward(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        for calls in self._calls.values():
            calls.end()

    def _vcls(self) -> Iterator[tuple[str, VCLActivation]]:
        for name, calls in self._calls.items():
            for call, vcl in enumerate(calls):
                yield (f"{name}:{call}" if call else name), vcl  # type: ignore[misc]

    def __repr__(self) -> str:
        """Name the layers."""
        return f"VCLHandle({', '.join(self._calls)})"

    def loss(self) -> Tensor:
        """Return ``weight`` times the sum over layers of the latest training forward's losses.

        Raises:
            RuntimeError: no training forward was run, or only without grad mode, so that the loss has no gradient.
        """
        ran = [(vcl.loss, vcl.latest.in_grad_mode) for _, vcl in self._vcls() if vcl.loss is not None]
        if not ran:
            raise RuntimeError("handle.loss() wants a training forward of the model first (model.train())")
        if torch.is_grad_enabled() and not any(in_grad_mode for _, in_grad_mode in ran):
            raise RuntimeError(
                "handle.loss() has no gradient: the training forward ran without grad mode, under torch.no_grad() "
                "(read handle.losses then) or reentrant checkpointing (use_reentrant=False or inject=True helps)"
            )
        device = ran[0][0].device
        return torch.stack([loss.to(device) for loss, _ in ran]).sum()

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
        for undo in self._undo:
            undo()
        self._calls, self._undo = {}, []


def _delete_vcl(module: nn.Module) -> None:
    if hasattr(module, "vcl"):
        del module.vcl


def _restore_original(parent: nn.Module, name: str, fused: FusedActivation) -> None:
    if getattr(parent, name, None) is fused:  # the user may have put another module there since
        parent.register_module(name, fused.release())


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups in which biases and the betas of VCL are not decayed, and all else is.

    >>> net = nn.Sequential(nn.Linear(4, 8), VCL(8), nn.ELU())
    >>> [len(group["params"]) for group in param_groups(net, 1e-4)]
    [1, 2]
    """
    decays: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_bias = name.startswith("bias") or name.endswith("bias")  # an LSTM has bias_ih_l0
            decays.setdefault(parameter, not is_bias and not isinstance(module, VCLActivation))
    return [
        {"params": [p for p, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]


def _chosen(
    model: nn.Module, layers: Iterable[str | nn.Module] | Callable[[str, nn.Module], bool] | None
) -> dict[str, nn.Module]:
    """Return the modules that get a VCL, by name. Raise ValueError where ``layers`` names what cannot have one."""
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

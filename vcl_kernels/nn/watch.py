"""What a handle watches so as to say when VCL does nothing: which forwards run, whether losses are read, betas move."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..torch_private import scale_of, version_of
from .modules import VCLActivation
from .steering import Steering

__all__ = ["Watch"]

ENOUGH_FORWARDS = 3  # an unread loss is told after so many training forwards
ENOUGH_STEPS = 5  # betas that stay are told after so many steps of other parameters


class Watch:
    """The watch of one handle. It reads counters and modes, never a value on a device."""

    def __init__(self) -> None:
        self.latest = ""  # forward: "training", "no_grad" (in training), "paused", "evaluation"
        self.unread = 0  # training forwards since the loss was read; counted up to ENOUGH_FORWARDS
        self.ever_read = self.ever_trained = False
        self.dropped = False  # an unread loss, by an evaluation
        self.several = False  # forwards before a reading, once
        self.betas, self.evaluations = Steps(), Steps()
        self.injected_forwards = 0
        self.scalers: Mapping[torch.amp.GradScaler, int] = {}  # those in use, and how often they were updated

    def forward(self, training: bool, steering: Steering) -> None:
        """Note a forward that begins."""
        if steering.paused:
            self.latest = "paused"
        elif not training:
            self.dropped = self.dropped or (self.latest == "training" and self.unread > 0)
            self.latest = "evaluation"
        elif not torch.is_grad_enabled():
            self.latest = "no_grad"
        else:
            self.latest, self.ever_trained = "training", True
            if self.evaluations.moving is not None:
                self.evaluations = Steps()
            if not steering.inject:
                self._count_unread(steering)

    def _count_unread(self, steering: Steering) -> None:
        if self.unread < ENOUGH_FORWARDS:
            self.unread += 1
        elif not self.ever_read:
            steering.warn(
                "unread",
                "the model runs in training, and handle.loss() was never read: VCL does nothing. Add handle.loss() to "
                "the objective, or attach(..., inject=True)",
            )

    def reading(self, any_ran: bool, model: nn.Module, steering: Steering) -> None:
        """Note that the loss is read; tell what it leaves out.

        Raises:
            RuntimeError: the model did not run yet.
        """
        if not any_ran:
            self._reading_nothing(model, steering)
        if self.unread > 1:
            if self.several:  # the first time may be a forward that gave betas their shape
                steering.warn(
                    "several",
                    "the model ran more than once in training since handle.loss() was read last, and only the latest "
                    "forward counts. Read it after each forward and add the results, or attach(..., inject=True)",
                )
            self.several = True
        self.unread, self.ever_read, self.dropped = 0, True, False

    def _reading_nothing(self, model: nn.Module, steering: Steering) -> None:
        if self.latest == "" and not self.ever_read and model.training:
            raise RuntimeError("handle.loss() wants a training forward of the model first (model.train())")
        if self.dropped:
            steering.warn(
                "dropped",
                "handle.loss() is 0 after an evaluation forward, and the training forward before that was not read: "
                "its loss is lost. Read handle.loss() before the model runs in evaluation",
            )
        elif self.latest == "evaluation" and torch.is_grad_enabled():
            if not self.ever_trained or self.evaluations.have_passed(model.parameters()):
                steering.warn(
                    "evaluation",
                    "handle.loss() is 0, for the model runs in evaluation mode. Call model.train() before training "
                    "steps (and validate under torch.no_grad())",
                )
        elif self.latest == "training":
            steering.warn(
                "frozen",
                "handle.loss() is 0: in the latest training forward no layer with VCL ran on an input that needs a "
                "gradient. Are the parameters before them frozen, or do they run under torch.no_grad() or reentrant "
                "checkpointing (use_reentrant=False helps)?",
            )

    def training_step(self, model: nn.Module, betas: list[nn.Parameter], steering: Steering) -> None:
        """Look whether betas move when other parameters do. Once they did, nothing is looked at any more."""
        betas = [beta for beta in betas if beta.requires_grad]
        if not betas or any(is_lazy(beta) for beta in betas):
            return
        others = (m for m in model.modules() if not isinstance(m, VCLActivation))
        if self.betas.have_passed((p for m in others for p in m.parameters(recurse=False)), betas):
            found = "have gradients" if any(beta.grad is not None for beta in betas) else "got no gradient"
            steering.warn(
                "betas",
                f"{ENOUGH_STEPS} optimizer steps moved other parameters, and no beta of VCL. They {found}: make the "
                "optimizer after attach, from model.parameters() or with handle.parameters(), and add handle.loss() to "
                "the objective. attach(..., learn_beta=False) keeps betas where they are",
            )

    def injected_forward(self, steering: Steering) -> None:
        """Look, once, for a GradScaler that is updated between forwards and that the handle does not know."""
        self.injected_forwards += 1
        if self.injected_forwards == 2 and not steering.grad_scaler_told:
            self.scalers = {scaler: version_of(scale) for scaler, scale in _scalers_in_use()}
        elif self.injected_forwards == 4 and not steering.grad_scaler_told:
            then, self.scalers = self.scalers, {}
            if all(then.get(scaler) in (None, version_of(scale)) for scaler, scale in _scalers_in_use()):
                return
            steering.warn(
                "scaler",
                "a torch.amp.GradScaler is in use, and this handle, whose losses are injected, knows none: if it "
                "scales the objective, it divides the gradient of VCL by its scale. Set handle.grad_scaler to the "
                "scaler, or to None if there is none",
            )


class Steps:
    """Counts the optimizer steps that moved some parameters, while others stayed."""

    def __init__(self) -> None:
        self.done = False
        self.moving: list[nn.Parameter] | None = None
        self.staying: list[nn.Parameter] = []
        self.versions = 0, 0
        self.count = 0

    def have_passed(self, moving: Iterable[nn.Parameter], staying: Iterable[nn.Parameter] = ()) -> bool:
        """Look again; return True, once, when ENOUGH_STEPS were counted."""
        if self.done:
            return False
        if self.moving is None:
            self.moving, self.staying = _some(moving), _some(staying)
            self.versions = _versions(self.moving), _versions(self.staying)
        versions = _versions(self.moving), _versions(self.staying)
        if versions[1] != self.versions[1]:
            self.done = True
        elif versions != self.versions:
            self.versions = versions
            self.count += 1
            self.done = self.count == ENOUGH_STEPS
            return self.done
        return False


def _some(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the first, middle and last of those that are learned."""
    learned = [p for p in parameters if p.requires_grad]
    return list({learned[i] for i in (0, len(learned) // 2, -1)}) if learned else []


def _versions(parameters: list[nn.Parameter]) -> int:
    return sum(map(version_of, parameters))


def _scalers_in_use() -> Iterator[tuple[torch.amp.GradScaler, torch.Tensor]]:
    """Yield the GradScalers of this process that were used, each with its scale, which it has from then on."""
    kinds = [torch.amp.GradScaler]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for scaler in gc.get_referrers(*kinds):
        scale = scale_of(scaler) if type(scaler) in kinds else None
        if scale is not None and scaler.is_enabled():
            yield scaler, scale

"""What a handle watches so as to say when VCL does nothing: which forwards run, whether losses are read, betas move."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..torch_private import scale_of, version_of
from .steering import ENOUGH_FORWARDS, Steering

__all__ = ["Watch"]

LOOKS = (2, 4, 16)  # the training forwards at which GradScalers are looked for, which takes long
LATEST_LOOK = LOOKS[-1]
ENOUGH_STEPS = 5  # betas that stay are told after so many steps of other parameters


class Watch:
    """The watch of one handle. It reads counters and modes, never a value on a device."""

    def __init__(self) -> None:
        self.latest = ""  # forward: "training", "no_grad" (in training), "paused", "evaluation"
        self.unread = 0  # training forwards since the loss was read; counted up to ENOUGH_FORWARDS
        self.trained = False  # since the loss was read after an evaluation
        self.dropped = False  # an unread loss, by an evaluation
        self.several = False  # forwards before a reading, once
        self.betas, self.evaluations = Steps(), Steps()
        self.injected_forwards = 0
        self.scales: dict[Tensor, int] = {}  # of GradScalers in use, and how often they were updated

    def forward(self, training: bool, steering: Steering) -> None:
        """Note a forward that begins."""
        if steering.paused:
            self.latest = "paused"
        elif not training:
            warm_up = 0 if steering.ever_read else 1  # a forward of a training that did not begin yet
            if self.latest == "training" and self.unread > warm_up:
                self.dropped = True
            self.latest = "evaluation"
        elif not torch.is_grad_enabled():
            self.latest = "no_grad"
        else:
            self.latest, self.trained = "training", True
            if not steering.inject:
                self._count_unread(steering)

    def _count_unread(self, steering: Steering) -> None:
        if self.unread < ENOUGH_FORWARDS:
            self.unread += 1
        elif not steering.ever_read:
            steering.warn_unread()

    def reading(self, any_ran: bool, model: nn.Module, steering: Steering) -> None:
        """Note that the loss is read; tell what it leaves out.

        Raises:
            RuntimeError: the model did not run yet.
        """
        if not any_ran:
            self._reading_nothing(model, steering)
        if self.unread > 1 or steering.lost:
            if self.several:  # the first time may be a forward that gave betas their shape
                steering.warn(
                    "several",
                    "the model ran more than once in training since handle.loss() was last read, and handle.loss() "
                    "covers only the latest forward. Read it after each forward and add the results. Wrap forwards "
                    "that need no VCL, such as a generator's step, in `with handle.paused():`",
                )
            self.several = True
        self.unread, self.dropped = 0, False
        steering.was_read = steering.ever_read = True

    def _reading_nothing(self, model: nn.Module, steering: Steering) -> None:
        if self.latest == "" and not steering.ever_read and not steering.ran_part and model.training:
            raise RuntimeError("handle.loss() was called before the model ran; it wants a training forward first")
        if self.dropped:
            steering.warn(
                "dropped",
                "handle.loss() is 0 after an evaluation forward, and the training forward before that was not read: "
                "its loss is lost. Read handle.loss() before the model runs in evaluation",
            )
        elif self.latest == "evaluation" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self.trained:  # between two validations
                self.trained, self.evaluations = False, Steps()
            if self.evaluations.have_passed(model.parameters()):
                steering.warn(
                    "evaluation",
                    "handle.loss() is 0 because the model runs in evaluation mode. Call model.train() before training, "
                    "and validate under torch.no_grad()",
                )
        elif (self.latest == "training" or (self.latest == "" and steering.ran_part)) and not steering.was_read:
            steering.warn(
                "frozen",
                "handle.loss() is 0: in the latest training forward no layer with VCL got an input that needs a "
                "gradient. Likely causes: the parameters before these layers are frozen, or the layers run under "
                "torch.no_grad() or reentrant checkpointing (use use_reentrant=False)",
            )

    def training_step(self, model: nn.Module, betas: list[nn.Parameter], steering: Steering) -> None:
        """Look whether betas move when other parameters do. Once they did, nothing is looked at any more."""
        if any(is_lazy(beta) for beta in betas):
            return
        of_betas = set(betas)
        betas = [beta for beta in betas if beta.requires_grad]
        self.betas.done = self.betas.done or not betas
        if self.betas.have_passed((p for p in model.parameters() if p not in of_betas), betas):
            if steering.inject or any(beta.grad is not None for beta in betas):
                cause = "The optimizer does not hold them: "
            else:
                cause = "They have no gradient now: add handle.loss() to the objective. If it is there, "
            steering.warn(
                "betas",
                f"{ENOUGH_STEPS} optimizer steps changed other parameters, and no beta of VCL. {cause}make the "
                'optimizer after attach, or call optimizer.add_param_group({"params": handle.parameters()}). To keep '
                "betas fixed, use attach(..., learn_beta=False)",
            )

    def injected_forward(self, steering: Steering) -> None:
        """Look for a GradScaler that is updated between forwards and that the handle does not know."""
        if self.injected_forwards < LATEST_LOOK:
            self.injected_forwards += 1
            if self.injected_forwards in LOOKS and not steering.grad_scaler_told:
                self.scales = {**{scale: version_of(scale) for scale in _scales_in_use()}, **self.scales}
        if steering.grad_scaler_told:
            self.scales = {}
        elif any(version_of(scale) != version for scale, version in self.scales.items()):
            self.scales = {}
            steering.warn(
                "scaler",
                "a torch.amp.GradScaler is in use, and handle.grad_scaler is not set. With inject=True its unscaling "
                "divides the gradient of VCL by the scale. Set handle.grad_scaler = scaler, or None if the objective "
                "is not scaled",
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
            self.moving, self.staying = _some(moving), list(staying)  # of a part that is frozen no beta moves
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


def _scales_in_use() -> Iterator[Tensor]:
    """Yield the scales of the GradScalers of this process that were used; each changes its own in place."""
    kinds = [torch.amp.GradScaler]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for scaler in gc.get_referrers(*kinds):
        scale = scale_of(scaler) if type(scaler) in kinds else None
        if scale is not None and scaler.is_enabled():
            yield scale

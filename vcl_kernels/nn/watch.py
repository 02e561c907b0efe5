"""What a handle watches so as to say when VCL does nothing: forwards, readings of the loss, steps of optimizers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..torch_private import scaler_that_steps
from .steering import ENOUGH_FORWARDS, Steering

__all__ = ["Watch", "follow", "unfollow"]

ENOUGH_STEPS = 5  # betas without a step are told after so many of an optimizer


class Watch:
    """The watch of one handle. It reads counters and modes, never a value on a device."""

    def __init__(self) -> None:
        self.latest = ""  # forward: "training", "no_grad" (in training), "paused", "evaluation"
        self.unread = 0  # training forwards since the loss was read; counted up to ENOUGH_FORWARDS
        self.trained = False  # since the loss was read after an evaluation
        self.dropped = False  # an unread loss, by an evaluation
        self.several = False  # forwards before a reading, once
        self.steps = self.steps_at_reading = 0  # of optimizers that hold parameters of the model
        self.betas_move = False  # or were told not to
        self.optimizers: WeakKeyDictionary[Optimizer, Held] = WeakKeyDictionary()

    # Forwards

    def forward(self, training: bool, steering: Steering) -> None:
        """Note a forward that begins."""
        if steering.paused:
            self.latest, self.trained = "paused", self.trained or training
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

    # Readings

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
                self.trained, self.steps_at_reading = False, self.steps
            elif self.steps - self.steps_at_reading >= ENOUGH_STEPS:
                steering.warn(
                    "evaluation",
                    "handle.loss() is 0 because the model runs in evaluation mode. Call model.train() before training, "
                    "and validate under torch.no_grad()",
                )
        elif (self.latest == "training" or (self.latest == "" and steering.ran_part)) and not steering.was_read:
            steering.warn(
                "frozen",
                "handle.loss() is 0: in the latest training forward no layer with VCL got an input that needs a "
                "gradient. Likely causes: the parameters before these layers are frozen, or the layers are in "
                "evaluation mode, or run under torch.no_grad() or reentrant checkpointing (use use_reentrant=False)",
            )

    # Steps of optimizers

    def step(self, optimizer: Optimizer, handle: Any, steering: Steering, ran: Callable[[], Any]) -> bool:
        """Note that ``optimizer`` made a step; return whether it holds parameters of the model.

        Betas are looked at until one was seen to have a gradient in a step.
        """
        held = self._held(optimizer, handle)
        if any(beta.grad is not None for beta in held.betas):
            self.betas_move = True
        if not held.others:
            return len(held.betas) > 0
        self._step_of_model(optimizer, held, handle, steering, ran)
        return True

    def _step_of_model(self, optimizer: Optimizer, held: Held, handle: Any, steering: Steering, ran: Any) -> None:
        self.steps += 1
        steering.forwards.ran_again = True  # what ran before a step is not run again
        if steering.inject and not steering.grad_scaler_told and "scaler" not in steering.said:
            self._look_for_scaler(steering)
        if self.betas_move or not (steering.inject or steering.ever_read):
            return
        if not any(beta.requires_grad for beta in handle.parameters()):
            self.betas_move = True
        elif ran():  # else frozen, or paused
            self._step_without_beta(optimizer, held, handle, steering)

    def _step_without_beta(self, optimizer: Optimizer, held: Held, handle: Any, steering: Steering) -> None:
        idle = self.optimizers[optimizer] = held._replace(idle_steps=held.idle_steps + 1)
        if idle.idle_steps < ENOUGH_STEPS:
            return
        self.betas_move = True
        if held.betas:
            text = "has them, and they have no gradient: add handle.loss() to the objective"
        elif _held_elsewhere(handle):
            return
        else:
            text = (
                "does not hold them: make it after attach, or call "
                'optimizer.add_param_group({"params": handle.parameters()})'
            )
        steering.warn(
            "betas",
            f"an optimizer made {ENOUGH_STEPS} steps in which no beta of VCL could change. It {text}. To keep betas "
            "fixed, use attach(..., beta_mode='fixed')",
        )

    def _held(self, optimizer: Optimizer, handle: Any) -> Held:
        """Return what ``optimizer`` holds; looked up again when its number of parameters changes."""
        number = sum(len(group["params"]) for group in optimizer.param_groups)
        held = self.optimizers.get(optimizer)
        if held is None or held.number != number:
            parameters = _parameters_of(optimizer)
            betas = {id(beta): beta for beta in handle.parameters()}
            others = any(id(p) in parameters and id(p) not in betas for p in handle.model.parameters())
            held = Held(number, others, [beta for key, beta in betas.items() if key in parameters])
            self.optimizers[optimizer] = held
        return held

    def _look_for_scaler(self, steering: Steering) -> None:
        """Look for a GradScaler that makes this step and that the handle does not know."""
        if scaler_that_steps() is not None:
            steering.warn(
                "scaler",
                "a torch.amp.GradScaler is in use, and handle.grad_scaler is not set. With inject=True its unscaling "
                "divides the gradient of VCL by the scale. Set handle.grad_scaler = scaler, or None if the objective "
                "is not scaled",
            )


class Held(NamedTuple):
    """What an optimizer holds of a model."""

    number: int  # of all its parameters
    others: bool  # than betas
    betas: list[nn.Parameter]
    idle_steps: int = 0  # in which VCL acted and no beta had a gradient here


def _parameters_of(optimizer: Optimizer) -> set[int]:
    """Return the ids of its parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _held_elsewhere(handle: Any) -> bool:
    """Whether any optimizer of this process holds a beta: one that steps less often. Asked once."""
    betas = {id(beta) for beta in handle.parameters()}
    return any(not betas.isdisjoint(_parameters_of(optimizer)) for optimizer in _living_optimizers())


def _living_optimizers() -> Iterator[Optimizer]:
    """Yield the optimizers of this process."""
    kinds: list[type] = [Optimizer]
    for known in kinds:
        kinds += known.__subclasses__()
    return (found for found in gc.get_referrers(*kinds) if type(found) in kinds)


# One hook for all handles: a hook cannot be removed while hooks run, and handles end at any time.
_followers: WeakSet[Any] = WeakSet()


def follow(handle: Any) -> None:
    """Call ``handle.optimizer_stepped(optimizer)`` after each step of any optimizer, as long as the handle lives."""
    _followers.add(handle)


def unfollow(handle: Any) -> None:
    """Stop that."""
    _followers.discard(handle)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for handle in list(_followers):
            handle.optimizer_stepped(optimizer)


register_optimizer_step_post_hook(_after_step)

"""What a method costs, and what it does to the pre-activations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .learning import Learner


def step_times(learners: dict[str, Learner], x: Tensor, y: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Return milliseconds of each training step, and their median.

    The methods take turns, so that a busy machine slows all alike.
    """
    names = list(learners)
    times: dict[str, list[float]] = {name: [] for name in names}
    for learner in learners.values():
        learner.model.train()
        for _ in range(3):
            learner.step(x, y)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]  # nobody always follows the same other
            _wait(x.device)
            start = time.perf_counter()
            learners[name].step(x, y)
            _wait(x.device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"step_ms": of, "median_step_ms": statistics.median(of)} for name, of in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Return the bytes that ``forward`` saves for backward. Each storage counts once, a ``known`` one does not."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())


def pre_activations(model: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """Return what enters ``activation`` in evaluation, as (C, values of that channel)."""
    return inputs_of([activation], model, x)[0]


@torch.no_grad()
def inputs_of(activations: Sequence[nn.Module], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what enters each of the activations in one evaluation forward, as (C, values of that channel)."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        activation.register_forward_pre_hook(lambda module, args: seen.update({module: args[0]}))
        for activation in activations
    ]
    model.eval()
    model(x)
    for hook in hooks:
        hook.remove()
    return [seen[activation].transpose(0, 1).flatten(1).cpu() for activation in activations]


def kurtosis(values: Tensor) -> Tensor:
    """Return each row's E[(v - mean)⁴] / variance²: 3 for a Gaussian, 1 for two points of equal weight."""
    centred = values.double() - values.double().mean(1, keepdim=True)
    return centred.pow(4).mean(1) / centred.square().mean(1).square()


def histogram(values: Tensor, bins: int = 80, reach: float = 4.0) -> dict[str, Any]:
    """Return the density of all channels together, each standardised, and the median channel's kurtosis."""
    standard = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp_min(1e-12)
    density, edges = torch.histogram(standard.flatten(), bins, range=(-reach, reach), density=True)
    return {"edges": edges.tolist(), "density": density.tolist(), "kurtosis": float(kurtosis(values).median())}

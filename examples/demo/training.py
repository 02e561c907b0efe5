"""One training: a method on a split, with what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .data import Data, load
from .learning import METHODS, MODES, Learner, Settings, build
from .measure import histogram, inputs_of, kurtosis

LOOKED_AT = 500  # test images whose pre-activations are measured
POINTS = 7  # of a curve, about: testing takes as long as an epoch
SHOWN = 6  # histograms, of the channels of least kurtosis
BINS, REACH = 48, 3.0  # of a histogram; standard deviations from the mean


@dataclass(frozen=True)
class Plan:
    """What all trainings share; ``vcl`` is what attach is given."""

    dataset: str
    images: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    device: str
    vcl: Mapping[str, Any] = field(hash=False)

    def data(self, split: int) -> Data:
        """Return the images of a split."""
        return load(self.dataset, self.images, split, self.device)

    def learner(self, method: str, split: int) -> Learner:
        """Return the network of a method before training, with its optimizer."""
        steps = self.epochs * (self.images // self.batch_size)
        vcl = {**self.vcl, **MODES} if method == "modes" else self.vcl
        example = self.data(split).train_x[:1]
        return build(method, example, split, Settings(steps, self.learning_rate, self.weight_decay, vcl))

    def tested(self) -> list[int]:
        """Return the epochs after which the network is tested: evenly spaced, the last among them."""
        return list(range(self.epochs, 0, -max(1, round(self.epochs / POINTS))))[::-1]


@dataclass(frozen=True)
class Task:
    """One training. The seed of first weights and of the order of images is the split's number."""

    plan: Plan
    method: str
    split: int

    def __str__(self) -> str:
        return f"{METHODS[self.method]}, split {self.split + 1}"


def train(task: Task, tell: Callable[[int], object]) -> dict[str, Any]:
    """Train once, calling ``tell`` with the number of each finished epoch; return what was measured."""
    plan, data = task.plan, task.plan.data(task.split)
    learner = plan.learner(task.method, task.split)
    order = torch.Generator().manual_seed(task.split)
    seen, epochs = data.test_x[:LOOKED_AT], plan.tested()
    found: dict[str, Any] = {"train_loss": [], "test_error": [], "test_nll": [], "variance": []}
    found["variance"].append(variances(learner.model, seen))
    for epoch in range(1, plan.epochs + 1):
        found["train_loss"].append(learner.epoch(data.train_x, data.train_y, plan.batch_size, order))
        if epoch in epochs:
            error, nll = scores(learner.model, data)
            found["test_error"].append(error)
            found["test_nll"].append(nll)
            found["variance"].append(variances(learner.model, seen))
        tell(epoch)
    (last,) = inputs_of(activations(learner.model)[-1:], learner.model, seen)
    each = kurtosis(last)
    found["kurtosis"] = each.tolist()
    if task.split == 0:
        found["histograms"] = [histogram(last[[i]], BINS, REACH) for i in each.argsort()[:SHOWN].tolist()]
    return found


@torch.no_grad()
def scores(model: nn.Module, data: Data) -> tuple[float, float]:
    """Return test error in per cent and mean negative log-likelihood, in evaluation."""
    model.eval()
    logits = torch.cat([model(x) for x in data.test_x.split(1000)])
    wrong = int((logits.argmax(1) != data.test_y).sum())
    return 100 * wrong / len(logits), float(F.cross_entropy(logits, data.test_y))


def activations(model: nn.Module) -> list[nn.Module]:
    """Return the five modules that compute ELU: torch.nn's, or VCL's where VCL is attached."""
    return [module for name, module in model.named_modules() if name.endswith(".elu")]


def variances(model: nn.Module, x: torch.Tensor) -> list[float]:
    """Return, for each ELU, the mean over channels of the variance of what enters it, over images and positions."""
    return [float(values.var(1).mean()) for values in inputs_of(activations(model), model, x)]

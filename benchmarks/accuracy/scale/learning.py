"""A linear layer that sees Gaussian values and learns by VCL alone: with which variance does it end?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vcl_kernels as vk
from vcl_kernels.scale import variance_over_beta

from ..results import rounded
from ..work import Record

INPUTS = 8
UNITS = 16  # for each pair of beta and variance at the start: they share a layer, and each learns as if it were alone
SETTLED = 0.9  # of the steps are done when the mean over the last steps begins


class Layer(nn.Module):
    """A 1x1 convolution, each unit's output times a gain; the gains learn, or the weights do.

    The logarithm of the gain is the parameter, so that a step has the same meaning for large and small variances.
    """

    def __init__(self, variance: Tensor, learns: str) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(INPUTS, len(variance), 1, bias=False)
        self.log_gain = nn.Parameter(variance.log()[:, None] / 2)
        weight = self.convolution.weight.data.normal_()
        weight.div_(weight.norm(dim=1, keepdim=True))
        self.log_gain.requires_grad_(learns == "gains")
        self.convolution.weight.requires_grad_(learns == "weights")

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x) * self.log_gain.exp()

    @torch.no_grad()
    def variance(self) -> Tensor:
        """The variance of each unit's output, for inputs of variance 1."""
        return (self.convolution.weight.norm(dim=1) * self.log_gain.exp()).square().flatten()


def learn(unit: Record) -> Record:
    """Train on new Gaussian inputs in each step; return the variance and beta at the end, for each beta and start.

    The learning rate falls linearly to 0. Adam divides a gradient by its size, so that a layer arrives where the loss
    is least even if the loss is nearly flat. SGD shows how hard the loss pulls.
    """
    groups, steps, M = unit["groups"], unit["steps"], unit["M"]
    n, P = (M, 1) if M <= 10 else (5, M // 5)
    torch.manual_seed(unit["seed"])
    variance, beta = (torch.tensor([g[name] for g in groups]).repeat_interleave(UNITS) for name in ("first", "beta"))
    layer = Layer(variance, unit["learns"])
    running = vk.VCL(sub_batch_size=n, weight=len(variance), beta_mode="running")
    beta.requires_grad_(unit["beta_mode"] == "learned")
    parameters = [p for p in (*layer.parameters(), beta) if p.requires_grad]
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[unit["optimizer"]](parameters, lr=unit["rate"])
    x, ends = torch.empty(2 * n, INPUTS, P), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = unit["rate"] * (1 - step / steps)
        optimizer.zero_grad()
        y = layer(x.normal_())
        if unit["beta_mode"] == "running":
            running(y)
            loss = running.loss
            assert loss is not None
        else:  # the sum: units do not share a gradient's size
            loss = vk.vcl_loss(y, beta, sub_batch_size=n, form=unit["form"], reduction="sum")
        loss.backward()
        optimizer.step()
        if step >= SETTLED * steps:
            ends.append(layer.variance())
    if unit["beta_mode"] == "running":
        assert isinstance(running.beta, Tensor)
        beta = running.beta.expand(len(variance))
    of_units, betas = (t.detach().reshape(len(groups), UNITS) for t in (torch.stack(ends).mean(0), beta))
    quantiles = of_units.quantile(torch.tensor([0.1, 0.9]), dim=1)
    found = {"variance": of_units.mean(1), "low": quantiles[0], "high": quantiles[1], "beta_end": betas.mean(1)}
    return {name: [rounded(value) for value in values.tolist()] for name, values in found.items()}


def target(M: int, beta: float) -> float:
    """Return the variance that a ratio with this beta asks for."""
    return beta * variance_over_beta(M)

"""One training of the study of defaults, and what became of the layers."""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vcl_kernels as vk
from examples.demo.learning import CLIP, Learner, batches

from ..cifar import machine
from ..data import Data
from ..methods import initialise
from ..training import scores
from ..work import Record
from . import tasks
from .settings import Setting

WEIGHT_DECAY = 5e-4
LOOKED_AT = 500  # training samples whose pre-activations are measured at the end


class ApartLearner(Learner):
    """Clips the gradients of the task and of VCL apart, so that neither takes the other's room, and adds them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shares: list[Tensor] = []  # of each step: the norm of VCL's gradient over that of the task's
        self.dtype = torch.float32

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch; return the objective."""
        self.optimizer.zero_grad()
        parameters = list(self.model.parameters())
        with autocast(self.dtype):
            task = F.cross_entropy(self.model(x).float(), y)
        task.backward(retain_graph=self.handle is not None)
        of_task = nn.utils.clip_grad_norm_(parameters, CLIP)
        objective = task.detach()
        if self.handle is not None:
            kept = [parameter.grad for parameter in parameters]
            self.optimizer.zero_grad()
            loss = self.handle.loss()
            loss.backward()
            self.shares.append(nn.utils.clip_grad_norm_(parameters, CLIP) / of_task)
            objective += loss.detach()
            for parameter, gradient in zip(parameters, kept, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.optimizer.step()
        return objective


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Compute in ``dtype``, as the CIFAR study does, where that is not float32."""
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def work(unit: Record) -> Record:
    """Train once; return error in per cent, negative log-likelihood, and the layers at the end."""
    setting = Setting(**{name: unit[name] for name in Setting._fields})
    is_table = unit["network"] == "tables"
    data = (
        tasks.table(unit["set"], unit["seed"], unit["validate"])
        if is_table
        else tasks.images(unit["network"], unit["seed"], unit["validate"])
    )
    batch = min(tasks.TABLE_BATCH, len(data.train_x)) if is_table else tasks.TASKS[unit["network"]].batch
    a_pass = len(data.train_x) // batch
    steps = tasks.TABLE_STEPS if is_table else tasks.TASKS[unit["network"]].epochs * a_pass
    model = tasks.network(unit["network"], data.train_x.shape[1], data.classes, setting.method == "bn")
    torch.manual_seed(unit["seed"])
    initialise(model)
    dtype = machine.dtype(torch.device("cpu")) if unit["network"] == "elu-11" else torch.float32
    if unit["network"] == "elu-11":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vk.VCLWarning)  # tables of few rows
        order = torch.Generator().manual_seed(unit["seed"])
        first = batches(len(data.train_x), batch, order.clone_state())[0]
        handle = None if setting.vcl is None else vk.attach(model, data.train_x[first], **setting.vcl)
        learner = ApartLearner(
            model, handle, steps=steps, learning_rate=unit["learning_rate"], weight_decay=WEIGHT_DECAY
        )
        learner.dtype = dtype
        for _ in range(math.ceil(steps / a_pass)):
            learner.epoch(data.train_x, data.train_y, batch, order)
        with autocast(dtype):
            accuracy, nll = scores(model, data.test_x, data.test_y)
        finite = math.isfinite(nll)
        found: Record = {
            "error": round(100 * (1 - accuracy), 4) if finite else round(100 - 100 / data.classes, 4),
            "nll": nll if finite else math.log(data.classes),
            "diverged": int(not finite),
        }
        last = [float(share) for share in learner.shares[2 * len(learner.shares) // 3 :]]
        found["gradient_share"] = statistics.median(last) if last else ""
        return found | layers(model, data)


@torch.no_grad()
def layers(model: nn.Module, data: Data) -> Record:
    """Return each layer's variance by activation and by channel, the variance beta asks for, and constancy."""
    model.train()
    seen: dict[str, list[dict[str, Any]]] = {}
    for unit in ("activation", "channel"):
        with vk.VCLMonitor(model, every=1, sub_batch_size=5, unit=unit) as monitor:
            model(data.train_x[:LOOKED_AT])
        seen[unit] = list(monitor.rows)

    def said(unit: str, column: str) -> str:
        return " ".join(f"{row[column]:.4g}" for row in seen[unit])

    return {
        "activation_variance": said("activation", "variance"),
        "channel_variance": said("channel", "variance"),
        "target": said("activation", "scale"),
        "constancy": said("activation", "constancy"),
    }

"""One training: an epoch at a time, its whole state in one dictionary, its metrics in another."""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

import vcl_kernels as vk
from examples.demo import record

from ..data import Data
from ..training import scores
from . import machine
from .recipe import BATCH, ReferenceLearner, attach, crop_and_flip, draw, network
from .records import COLUMNS, Record, epochs_of
from .runs import Run

CPU = torch.device("cpu")
LOOKS = 6  # layers are looked at before the first epoch, and after each sixth of them


class Stopped(Exception):  # noqa: N818
    """The training was asked to stop in the middle of an epoch: the state of its last checkpoint counts."""


class Training:
    """A run on a data set.

    ``record`` is what is kept of it: settings, a column for each of COLUMNS with an entry for each epoch, and what was
    seen in the layers.
    """

    def __init__(self, run: Run, data: Data, *, dtype: torch.dtype, device: torch.device) -> None:
        if run.learning_rate is None:
            raise ValueError(f"{run.name} has no learning rate yet: stage 0 chooses it")
        self.run, self.data, self.device = run, data, device
        self.batch = min(BATCH, len(data.train_x))
        torch.manual_seed(run.seed)
        model = network(run.method, data.classes, run.k).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        plain = sum(p.numel() for p in model.parameters())
        handle = attach(model, run.method, data.train_x[:1])
        steps = run.epochs * (len(data.train_x) // self.batch)
        self.learner = ReferenceLearner(model, handle, steps=steps, learning_rate=run.learning_rate, dtype=dtype)
        self.random = torch.Generator().manual_seed(run.seed)
        torch.manual_seed(run.seed)  # every method drops the same values
        self.dropout = self._dropout()
        self.record: Record = {
            "run": asdict(run),
            "machine": machine.describe(device, dtype),
            "versions": record.versions(),
            "parameters": {"network": plain, "vcl": sum(p.numel() for p in model.parameters()) - plain},
            "images": {
                "training": len(data.train_x),
                "scored": len(data.test_x),
                "labels_crc32": zlib.crc32(data.train_y.cpu().numpy().tobytes()),  # tells their order, and the split
            },
            "resumed_after_epochs": [],
            "diverged": False,
            "epochs": {column: [] for column in COLUMNS},
            "layers": [],
        }

    @property
    def done(self) -> int:
        """Epochs that are done."""
        return epochs_of(self.record)

    @property
    def finished(self) -> bool:
        return self.done == self.run.epochs or self.record["diverged"]

    def epoch(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Learn for one epoch, in batches of equal size (images that make no whole batch are left out), and score.

        Raises:
            Stopped: ``stop()`` said so between two steps.
        """
        if self.done == 0:
            self.look()
        began = time.process_time()
        self._set_dropout()
        learner, data = self.learner, self.data
        rate = learner.optimizer.param_groups[0]["lr"]
        drawn = draw(len(data.train_x), self.random, self.device)
        losses = []
        learner.model.train()
        for start in range(0, len(data.train_x) - self.batch + 1, self.batch):
            if stop():
                raise Stopped
            part = slice(start, start + self.batch)
            chosen = drawn.order[part]
            x = crop_and_flip(data.train_x[chosen], drawn.corner[:, part], drawn.mirrored[part])
            losses.append(learner.step(x, data.train_y[chosen]))
        self.dropout = self._dropout()
        task, penalty = torch.stack(losses).double().mean(0).tolist()
        with learner.autocast:
            accuracy, nll = scores(learner.model, data.test_x, data.test_y)
        seconds = time.process_time() - began
        for column, value in zip(COLUMNS, (100 * (1 - accuracy), nll, task, penalty, rate, seconds), strict=True):
            self.record["epochs"][column].append(value)
        self.record["diverged"] = not math.isfinite(task)
        if self.done in looked_at(self.run.epochs):
            self.look()

    def state(self) -> Record:
        """Return all that another process needs to go on: model, optimizer, schedule, generators, record."""
        return {
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "schedule": self.learner.schedule.state_dict(),
            "random": self.random.get_state(),
            "dropout": self.dropout,
            "record": self.record,
        }

    def load(self, state: Record) -> None:
        """Go on from ``state()`` of the same run.

        Raises:
            ValueError: it is of other settings, another machine or other images.
        """
        for part in ("run", "machine", "images"):
            if state["record"][part] != self.record[part]:
                raise ValueError(f"it is of {part} {state['record'][part]}, not {self.record[part]}")
        self.learner.model.load_state_dict(state["model"])
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.learner.schedule.load_state_dict(state["schedule"])
        self.random.set_state(state["random"].cpu())
        self.dropout = state["dropout"].cpu()
        self.record = copy.deepcopy(state["record"])
        self.record["resumed_after_epochs"].append(self.done)

    def _dropout(self) -> Tensor:
        """Return the state of the generator that dropout draws from."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set_dropout(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.dropout, self.device)
        else:
            torch.set_rng_state(self.dropout)

    def look(self) -> None:
        """Record what the layers are like on the first batch of training images, as they are in training.

        Of each activation's input: variance and constancy (as VCLMonitor defines them), mean over channels and mean
        over activations; of beta the mean and the least. Of each convolution before an activation: the norm of VCL's
        gradient by the weight, over the norm of the cross-entropy's. ``train_loss`` is that of the batch. A copy of
        the model is looked at, so the training stays as it is.
        """
        learner = copy.copy(self.learner)
        learner.model = copy.deepcopy(self.learner.model)
        learner.handle = None if self.learner.handle is None else learner.model.vcl_handle  # type: ignore[assignment]
        model = learner.model.train()
        self._set_dropout()
        seen: Record = {"after_epochs": self.done}
        by_channel, by_activation = (
            vk.VCLMonitor(model, unit=unit, sub_batch_size=5) for unit in ("channel", "activation")
        )
        with by_channel, by_activation:
            part = slice(0, self.batch)
            task, penalty = learner.losses(self.data.train_x[part], self.data.train_y[part])
        seen["train_loss"] = float(task.detach())
        for unit, monitor in (("channel", by_channel), ("activation", by_activation)):
            for name in ("variance", "constancy"):
                seen[f"{name}_by_{unit}"] = [row[name] for row in monitor.rows]
        if learner.handle is not None:
            seen |= {name: [row[name] for row in by_channel.rows] for name in ("beta", "beta_least")}
            weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)][: len(by_channel.rows)]
            of_task = torch.autograd.grad(task, weights, retain_graph=True)
            of_vcl = torch.autograd.grad(penalty, weights)
            seen["gradient_share"] = [float(b.norm() / a.norm()) for a, b in zip(of_task, of_vcl, strict=True)]
        self.record["layers"].append(seen)


def looked_at(epochs: int) -> set[int]:
    """Return the numbers of epochs after which layers are looked at."""
    return {round(i * epochs / LOOKS) for i in range(1, LOOKS + 1)}

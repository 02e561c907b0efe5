"""One training step of whole networks under each method: the paper's 11 layers, ResNet-50 and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vcl_kernels as vk
from examples.demo.measure import saved_bytes

from ..accuracy.models import elu_11, mlp, resnet_50
from .race import Candidate, Clock, Contest, Factories

LEARNED = {"unit": "channel", "beta_mode": "learned", "beta_init": 1.0}
METHODS: dict[str, dict[str, Any] | None] = {  # the settings of attach
    "no normalisation": None,
    "batch norm": None,
    "VCL, ratio": {"form": "ratio", "sub_batch_size": 5, **LEARNED},
    "VCL, relative_variance": {"form": "relative_variance", "sub_batch_size": 8, **LEARNED},
}


class Setting(NamedTuple):
    name: str
    build: Callable[..., nn.Module]
    classes: int
    shape: tuple[int, ...]
    half: bool = True  # whether bfloat16 is timed too
    compiled: bool = True  # whether the compiled network is timed too


def settings(device: str, rehearse: bool) -> list[Setting]:
    """The paper's batch and ImageNet's images on a GPU; fewer and smaller on a CPU."""
    small = Setting("MLP, 4 layers of 64", mlp, 10, (64, 64), half=False)  # nothing to compute, in whatever dtype
    if rehearse:
        return [Setting("ELU-11, k = 0.05", partial(elu_11, k=0.05), 10, (20, 3, 32, 32))]
    if device == "cuda":
        paper = Setting("ELU-11, k = 1", elu_11, 10, (250, 3, 32, 32))
        return [paper, small, Setting("ResNet-50", resnet_50, 1000, (128, 3, 224, 224))]
    paper = Setting("ELU-11, k = 0.5", partial(elu_11, k=0.5), 10, (50, 3, 32, 32))
    return [paper, small, Setting("ResNet-50", resnet_50, 1000, (64, 3, 64, 64), compiled=False)]  # it takes minutes


class Step:
    """Forward, backward and update of one network under one method."""

    def __init__(self, setting: Setting, method: str, device: str, half: bool, compiled: bool) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(setting.shape, device=device)
        self.y = torch.randint(setting.classes, setting.shape[:1], device=device)
        self.model = setting.build(setting.classes, batch_norm=method == "batch norm").to(device)
        options = METHODS[method]
        self.handle = None if options is None else vk.attach(self.model, self.x, **options)
        self.optimizer = torch.optim.SGD(vk.param_groups(self.model, 1e-4), lr=1e-6, momentum=0.9)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=half)
        self.run = torch.compile(self.model, options={"fx_graph_cache": False}) if compiled else self.model

    def objective(self) -> Tensor:
        with self.autocast:
            loss = F.cross_entropy(self.run(self.x), self.y)
        return loss if self.handle is None else loss + self.handle.loss()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.objective().backward()
        self.optimizer.step()

    def memory(self) -> int:
        return saved_bytes(self.objective, self.model.parameters())


def contests(device: str, rehearse: bool, clock: Callable[[], Clock]) -> list[Contest]:
    """Eager before compiled, which on a CPU is in float32 alone."""
    variants = [
        (s, half, False) for s in settings(device, rehearse) for half in ((False, True) if s.half else (False,))
    ]
    if not rehearse:
        variants += [(s, half, True) for s, half, _ in variants if s.compiled and not (half and device == "cpu")]
    found = []
    for setting, half, compiled in variants:
        dtype, shape = "bfloat16 autocast" if half else "float32", "x".join(map(str, setting.shape))
        factories: Factories = {m: partial(_candidate, setting, m, device, half, compiled) for m in METHODS}
        contest = Contest(
            f"{setting.name} {shape}, {dtype}, {'compiled' if compiled else 'eager'}",
            factories,
            clock,
            whole=frozenset(METHODS),
            memory=lambda candidate: candidate.forward.memory(),  # type: ignore[attr-defined]
            seconds=0.1 if rehearse else 12.0,
            least=2 if rehearse else 15,
            most=200,
            info={"network": setting.name, "dtype": dtype, "compiled": compiled, "shape": setting.shape},
        )
        found.append(contest)
    return found


def _candidate(setting: Setting, method: str, device: str, half: bool, compiled: bool) -> Candidate:
    return Candidate(Step(setting, method, device, half, compiled))

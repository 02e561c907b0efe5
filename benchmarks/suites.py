"""The suites of contests: ``loss``, ``activation``, ``launch`` and ``networks``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import cases, networks
from .candidates import Factories, Inputs, activations, floor_bytes, losses
from .cases import Case
from .contest import Contest
from .graphs import captured
from .race import Clock, EventClock, WallClock

COMPILED = {"cpu": 4, "cuda": 10}  # of the first cases: compiling one takes up to half a minute


def loss(device: str, rehearse: bool) -> list[Contest]:
    return _ops(losses, device, rehearse)


def activation(device: str, rehearse: bool) -> list[Contest]:
    return _ops(activations, device, rehearse)


def _ops(candidates: Callable[[Inputs, bool], Factories], device: str, rehearse: bool) -> list[Contest]:
    found = []
    for index, case in enumerate(cases.cases(device, rehearse)):
        with_compiled = not rehearse and index < COMPILED[device]
        factories = candidates(_inputs(case, device, rehearse), with_compiled)
        contest = _contest(case, factories, partial(_device_clock, device), rehearse)
        contest.floor = partial(floor_bytes, case)
        found.append(contest)
    return found


def launch(device: str, rehearse: bool) -> list[Contest]:
    """The cost of a call on the host, and on a GPU of a replayed graph."""
    found: list[Contest] = []
    for case in cases.small(rehearse):
        i = _inputs(case, device, rehearse)
        factories = {**losses(i, False), **activations(i, False)}
        found.append(_contest(case, factories, partial(WallClock, device), rehearse))
        if device == "cuda":
            graphs: Factories = {name: partial(captured, make) for name, make in factories.items()}
            contest = _contest(case, graphs, EventClock, rehearse)
            contest.name += " in a CUDA graph"
            contest.whole = frozenset(graphs)
            found.append(contest)
    for contest in found:
        contest.most = 501
    return found


def network(device: str, rehearse: bool) -> list[Contest]:
    return networks.contests(device, rehearse, partial(_device_clock, device))


SUITES: dict[str, Callable[[str, bool], list[Contest]]] = {
    "loss": loss,
    "activation": activation,
    "launch": launch,
    "networks": network,
}


def _inputs(case: Case, device: str, rehearse: bool) -> Inputs:
    return Inputs(case, device, "triton" if rehearse and device == "cpu" else None)


def _device_clock(device: str) -> Clock:
    return EventClock() if device == "cuda" else WallClock(device)


def _contest(case: Case, factories: Factories, clock: Callable[[], Clock], rehearse: bool) -> Contest:
    limits: dict[str, Any] = {"seconds": 0.1, "least": 2} if rehearse else {}
    if torch.cuda.is_available() and not rehearse:
        limits = {"seconds": 0.7}
    info = {**case._asdict(), "bytes": case.bytes}
    return Contest(str(case), factories, clock, frozenset({"copy"}), info=info, **limits)

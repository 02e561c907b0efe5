"""The suites: ``pytest benchmarks/speed --benchmark-only -k "test_loss and 7x7"``; records: ``-m benchmarks.speed``.

A contest is raced when its first candidate is reached, among those that ``-k`` selects. The tests then hand the times
to pytest-benchmark, by a clock that stands still but for them: rounds are shared by all candidates that way, and times
can come from a GPU's events.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from .. import cases
from ..cases import Case
from . import networks
from .candidates import Inputs, activations, floor_bytes, losses
from .race import Clock, Contest, EventClock, Factories, WallClock

COMPILED = {"cpu": 4, "cuda": 10}  # of the first cases: compiling one takes up to half a minute
Measure = Callable[[], None]


def ops(candidates: Callable[[Inputs, bool], Factories], device: str, rehearse: bool) -> list[Contest]:
    """Return a contest for each shape, timed on the device."""
    found = []
    for index, case in enumerate(cases.cases(device, rehearse)):
        factories = candidates(_inputs(case, device, rehearse), not rehearse and index < COMPILED[device])
        clock, floor = partial(_device_clock, device), partial(floor_bytes, case)
        found.append(_contest(case, factories, clock, rehearse, floor=floor))
    return found


def launches(device: str, rehearse: bool) -> list[Contest]:
    """Return contests of what a call costs on the host."""
    found = []
    for case in cases.SMALL[: 1 if rehearse else None]:
        inputs = _inputs(case, device, rehearse)
        factories = losses(inputs) | activations(inputs)
        found.append(_contest(case, factories, partial(WallClock, device), rehearse, most=501))
    return found


SUITES: dict[str, Callable[[str, bool], list[Contest]]] = {
    "loss": partial(ops, losses),
    "activation": partial(ops, activations),
    "launch": launches,
    "networks": lambda device, rehearse: networks.contests(device, rehearse, partial(_device_clock, device)),
}


def _inputs(case: Case, device: str, rehearse: bool) -> Inputs:
    return Inputs(case, device, "triton" if rehearse and device == "cpu" else None)


def _device_clock(device: str) -> Clock:
    return EventClock() if device == "cuda" else WallClock(device)


def _contest(case: Case, factories: Factories, clock: Callable[[], Clock], rehearse: bool, **settings: Any) -> Contest:
    if rehearse:
        settings |= {"seconds": 0.1, "least": 2}
    elif torch.cuda.is_available():
        settings["seconds"] = 0.7
    info = {**case._asdict(), "bytes": case.bytes}
    return Contest(str(case), factories, clock, frozenset({"copy"}), info=info, **settings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = metafunc.function.__name__.removeprefix("test_")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contests = SUITES[suite](device, metafunc.config.getoption("rehearse"))
    entries = [(c, name, phase) for c in contests for name in c.factories for phase in c.phases(name)]
    ids = ["-".join(re.sub(r"[^\w.]+", "_", part) for part in (c.name, name, phase)) for c, name, phase in entries]
    metafunc.parametrize(("contest", "candidate", "phase"), entries, ids=ids)


def test_loss(measure: Measure) -> None:
    """vcl_loss beside its formula in PyTorch, the normalisations and a copy."""
    measure()


def test_activation(measure: Measure) -> None:
    """vcl_activation beside the bare activation, batch norm before it and a copy."""
    measure()


def test_launch(measure: Measure) -> None:
    """Both on tensors so small that only the cost of a call is left."""
    measure()


def test_networks(measure: Measure) -> None:
    """Training steps of whole networks without normalisation, with batch norm and with VCL."""
    measure()

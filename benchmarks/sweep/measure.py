"""One decision measured: each setting checked for the same results, then all timed in the same rounds, L2 cold."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.graphs import captured
from benchmarks.launches import Recorded
from benchmarks.race import Candidate, Clock, EventClock, WallClock, race
from vcl_kernels.backends.triton.launch import Settings

from .decisions import Decision, neighbours

COLD = 256 << 20  # bytes of inputs that launches rotate over: more than the L2 of any GPU
Record = dict[str, Any]


def described(settings: Settings) -> str:
    """Settings in a few words."""
    tile = " ".join(f"{axis}={size}" for axis, size in settings.tile.items())
    return f"{tile} warps={settings.warps}" + (f" splits={settings.splits}" if settings.splits > 1 else "")


def measured(decision: Decision, device: str, seconds: float) -> Record:
    """Time the rule's settings and their neighbours; the loss of the rule is its time over the best, less 1."""
    torch.manual_seed(0)
    x = decision.case.tensor(device)
    copies = max(2, COLD // decision.case.bytes) if device == "cuda" else 2
    inputs = [x, *(decision.case.tensor(device) for _ in range(min(copies, 32) - 1))]
    ours = [decision.recorded(one) for one in inputs]
    wanted = _results(decision, x)
    alternatives, candidates = [], {}
    for settings in neighbours(ours[0], decision.module):
        name = described(settings)
        row: Record = {"settings": name, **settings._asdict()}
        alternatives.append(row)
        try:
            with decision.with_settings(settings):
                row["wrong"] = _difference(_results(decision, x), wanted)
                launches = [_with_args_of(own, decision.recorded(one)) for own, one in zip(ours, inputs, strict=True)]
            if row["wrong"] is None:
                candidates[name] = _candidate(launches, device)
        except Exception as error:  # too much shared memory, too many registers: what a compiler may refuse
            row["failed"] = f"{type(error).__name__}: {error}"
    clock: Clock = EventClock() if device == "cuda" else WallClock(device)
    samples = race(candidates, clock, seconds, least=3, most=50) if candidates else {}
    for row in alternatives:
        if row["settings"] in samples:
            row["seconds"] = [lap / len(inputs) for lap in samples[row["settings"]]["both"]]
            row["median"] = statistics.median(row["seconds"])
    return {"decision": str(decision), "kernel": ours[0].launch.kernel.__name__, **_verdict(alternatives)}


def _verdict(alternatives: list[Record]) -> Record:
    """The rule's settings come first among the alternatives."""
    timed = [row for row in alternatives if "median" in row]
    best = min(timed, key=lambda row: row["median"], default=None)
    of_rule = alternatives[0].get("median")
    return {
        "rule": alternatives[0]["settings"],
        "best": best and best["settings"],
        "loss_of_rule": of_rule / best["median"] - 1 if best and of_rule else None,
        "alternatives": alternatives,
    }


def _candidate(launches: list[Recorded], device: str) -> Candidate:
    def forward() -> None:
        for launch, args in launches:
            launch(*args)

    return captured(lambda: Candidate(forward)) if device == "cuda" else Candidate(forward)


def _results(decision: Decision, x: Tensor) -> list[Tensor]:
    found = decision.job(x)()
    found = found if isinstance(found, tuple) else (found,)
    return [t.clone() for t in found if isinstance(t, Tensor)]


def _difference(actual: list[Tensor], wanted: list[Tensor]) -> str | None:
    """What differs by more than sums in another order explain."""
    for index, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        few_bits = b.dtype in (torch.bfloat16, torch.float16)
        if not torch.allclose(a, b, rtol=2e-2 if few_bits else 1e-3, atol=1e-2 if few_bits else 1e-4, equal_nan=True):
            return f"result {index} differs by {(a.double() - b.double()).abs().max().item():.3g}"
    return None


def _with_args_of(own: Recorded, other: Recorded) -> Recorded:
    """The other launch on own tensors where they have the same shape: so that all share what is large."""

    def same(a: Any, b: Any) -> bool:
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype

    return Recorded(other.launch, tuple(a if same(a, b) else b for a, b in zip(own.args, other.args, strict=True)))

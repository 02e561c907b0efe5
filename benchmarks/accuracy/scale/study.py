"""The scale that beta sets: the ratio's expectation, and layers that learn by VCL alone."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console

from vcl_kernels.scale import variance_over_beta

from .. import results
from ..work import Record, do
from .expected import expected_ratio, least, slope
from .learning import INPUTS, UNITS, learn, target

SIZES = (2, 3, 5, 10, 25, 100, 1000)  # values in a sub-batch
BETAS = (0.1, 1.0, 10.0)
STARTS = (0.03, 1.0, 30.0)  # variance at the start, as a multiple of the one that the ratio asks for
SHARED = ("part", "M", "form", "beta_mode", "learns", "optimizer", "rate", "steps", "seed")
FOUND = (
    "variance",
    "low",
    "high",
    "beta_end",
)  # variance: mean of units and last steps; low, high: 10 and 90 % of units


def run(options: argparse.Namespace, console: Console) -> None:
    """Write ``scale-expected`` and ``scale``."""
    settings = {"inputs": INPUTS, "units": UNITS, "steps": 60 if options.quick else 1500}
    units = layers(settings["steps"], options.quick)
    arguments: dict[str, Any] = {"processes": options.processes, "minutes": options.minutes}
    records = do(units, learn, options.out / "scale.jsonl", console, **arguments)
    results.write("scale", [row for record in records for row in rows_of(record)], settings, options.out)
    results.write("scale-expected", [expected(M) for M in SIZES], {}, options.out)


def expected(M: int) -> Record:
    """Return where the expectation is least, and its values and slopes there and elsewhere."""
    place, loss = least(M)
    at_beta, far = expected_ratio(np.array([1.0, 100.0]), M).tolist()
    return {
        "M": M,
        "variance_over_beta": place,
        "fitted": variance_over_beta(M),
        "loss": loss,
        "loss_at_beta": at_beta,
        "loss_at_100_beta": far,
        "slope_at_a_quarter": slope(place / 4, M),
        "slope_at_four_times": slope(place * 4, M),
    }


def layers(steps: int, quick: bool) -> list[Record]:
    """Return the layers to train, in three parts: targets, weights and forms."""
    sizes, betas = ((5, 25), (1.0,)) if quick else (SIZES[1:], BETAS)
    every = [(beta, start) for beta in betas for start in STARTS]
    with_one = [(1.0, start) for start in STARTS]
    found = [trained("targets", M, every) for M in sizes]
    found += [trained("weights", M, with_one, learns="weights", rate=0.02) for M in ((5,) if quick else (5, 25))]
    for M in (5,) if quick else (5, 100):
        found += [trained("forms", M, with_one, beta_mode="learned")]
        # It has nowhere to arrive, and smaller steps wander less. A layer has one beta.
        found += [trained("forms", M, [(1.0, start)], beta_mode="running", rate=0.01) for start in STARTS]
        for beta in (1e-5, 1.0):
            settings = {"form": "relative_variance", "optimizer": "sgd", "rate": 0.1}
            found += [trained("forms", M, [(beta, start) for start in STARTS], **settings)]
    return [{**unit, "steps": steps, "seed": seed} for seed, unit in enumerate(found)]


def trained(part: str, M: int, groups: list[tuple[float, float]], **settings: Any) -> Record:
    """Return a layer's settings; of each group beta, and the start as a multiple of what the ratio asks for."""
    shared = {"form": "ratio", "beta_mode": "fixed", "learns": "gains", "optimizer": "adam", "rate": 0.04, **settings}
    return {
        "part": part,
        "M": M,
        **shared,
        "groups": [
            {"beta": beta, "start": start, "first": start * target(M, beta if shared["form"] == "ratio" else 1.0)}
            for beta, start in groups
        ],
    }


def rows_of(record: Record) -> list[Record]:
    """Return a row for each beta and start."""
    shared = {name: record[name] for name in SHARED}
    return [
        {**shared, **group, **{name: record[name][i] for name in FOUND}} for i, group in enumerate(record["groups"])
    ]

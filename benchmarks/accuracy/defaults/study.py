"""The two phases of the study of defaults."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

from rich.console import Console

from .. import results
from ..work import Record, do
from .choice import best_rates, candidates
from .settings import AFTERWARDS, BATCH_NORM, NONE, SETTINGS, Setting
from .tasks import SCREENED, TABLES, TASKS
from .training import work

RATES = (0.05, 0.1)
SCREENING_SEED = 100
SEEDS = {"demo": 8, "resnet-relu": 8, "resnet-elu": 8, "elu-11": 5, "tables": 8}


def run(options: argparse.Namespace, console: Console) -> None:
    """Screen settings, choose candidates by the plan, and compare them; write ``defaults-screen`` and ``defaults``."""
    finish = partial(do, work=work, console=console, processes=options.processes, minutes=options.minutes)
    settings = {"rates": RATES, "seeds": SEEDS, "at_most": options.seeds}
    networks = SCREENED[:1] if options.quick else SCREENED
    methods = (NONE, BATCH_NORM, *(SETTINGS[:2] if options.quick else SETTINGS))
    trials = [unit for network in networks for unit in rated(methods, network)]
    screened = finish(trials, path=options.out / "defaults-screen.jsonl")
    results.write("defaults-screen", screened, settings, options.out)
    if len(screened) < len(trials):
        return
    methods = (NONE, BATCH_NORM, *candidates(screened))
    others = [] if options.quick else [unit for place in places() for unit in rated(methods, *place)]
    rated_there = finish(others, path=options.out / "defaults-rates.jsonl")
    results.write("defaults-rates", rated_there, settings, options.out)
    rates = best_rates([*screened, *rated_there])
    compared: list[tuple[str, str]] = [(network, "") for network in networks]
    compared += [] if options.quick else places()
    units = [
        unit_of(method, network, table, seed, validate=False, rate=rates[method, network, table])
        for seed in range(1 if options.quick else options.seeds or max(SEEDS.values()))
        for network, table in compared
        if seed < SEEDS[network]
        for method in methods
        if (method, network, table) in rates
    ]
    results.write("defaults", finish(units, path=options.out / "defaults.jsonl"), settings, options.out)
    again = [
        unit | other._asdict()
        for other, like in AFTERWARDS.items()
        for unit in units
        if {name: unit[name] for name in Setting._fields} == like._asdict()
    ]
    found = finish(again, path=options.out / "defaults-after.jsonl")
    results.write("defaults-after", found, settings, options.out)


def places() -> list[tuple[str, str]]:
    """Return networks, and sets of tables, of which phase 1 has no runs."""
    return [*((name, "") for name in TASKS if name not in SCREENED), *(("tables", name) for name in TABLES)]


def rated(methods: Iterable[Setting], network: str, table: str = "") -> list[Record]:
    """Return a run on validation data for each method and rate."""
    return [
        unit_of(method, network, table, SCREENING_SEED, validate=True, rate=rate)
        for method in methods
        for rate in RATES
    ]


def unit_of(method: Setting, network: str, table: str, seed: int, *, validate: bool, rate: float) -> dict[str, Any]:
    """Return one unit of work."""
    place = {"network": network, "set": table, "seed": seed, "validate": validate, "learning_rate": rate}
    return place | method._asdict()

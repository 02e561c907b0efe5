"""One setting of VCL changed at a time, on digits: what n, weight, form, unit, K and beta matter."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from . import images, results
from .work import Record, do

WEIGHTS = (0.001, 0.1, 0.3, 1.0)  # beside 0.01, which the bases have
SUB_BATCHES = (2, 3, 8, 16, 32)  # beside 5
BASE: dict[str, dict[str, Any]] = {
    "ratio": {"form": "ratio", "beta_mode": "learned"},
    "relative_variance": {"form": "relative_variance", "beta_mode": "fixed", "beta_init": 1e-3},
}
COUNTS = {"ratio": (4, 10, 20), "relative_variance": (2, 4, 10)}  # beside 2 and all 20
RATES = (0.01, 0.2)  # beside 0.05
Variant = tuple[str, str, str, dict[str, Any]]


def variants() -> list[Variant]:
    """Return (network, what is changed, its value, what is special in the unit of work).

    No VCL, batch norm and the bases are among them. Where the training itself is changed, the values are methods.
    """
    found: list[Variant] = []
    for network in ("multilayer", "demo"):
        found += [(network, "method", method, {"method": method}) for method in ("none", "bn")]
        found += [(network, "form", form, {"vcl": base}) for form, base in BASE.items()]
    for form, base in BASE.items():
        one_change: list[tuple[str, float, dict[str, Any]]] = [
            *(("weight", weight, {"weight": weight}) for weight in WEIGHTS),
            *(("n", n, {"sub_batch_size": n}) for n in SUB_BATCHES),
            *(("K", K, {"num_sub_batches": K}) for K in COUNTS[form]),
        ]
        found += [("multilayer", f"{name}, {form}", str(v), {"vcl": base | change}) for name, v, change in one_change]
        per_activation = {**base, "unit": "activation"}
        for weight in (0.1, 1.0, 10.0):
            found += [("demo", f"weight, {form}", str(weight), {"vcl": {**base, "weight": weight}})]
        found += [("demo", f"unit, {form}", "activation", {"vcl": per_activation})]
        found += [("demo", f"unit, {form}", "activation, weight 0.1", {"vcl": {**per_activation, "weight": 0.1}})]
    found += [("multilayer", "form", "variance", {"vcl": {"form": "variance", "beta_mode": "fixed"}})]
    for beta, learn in ((0.01, True), (0.01, False), (0.1, True), (0.1, False), (1.0, False)):
        name = f"{beta:g}, {'learned' if learn else 'fixed'}"
        settings = {"form": "ratio", "beta_init": beta, "beta_mode": "learned" if learn else "fixed"}
        found += [("multilayer", "beta, ratio", name, {"vcl": settings})]
    for rate in RATES:
        found += by_method("demo", f"learning rate {rate}", learning_rate=rate)
    for activation in ("elu", "relu"):
        for he in (True, False):
            start = "He's initialisation" if he else "PyTorch's initialisation"
            found += by_method("multilayer-12", f"{activation}, {start}", activation=activation, he=he)
    return found


def by_method(network: str, changed: str, **settings: Any) -> list[Variant]:
    """Return each method under the same change of the training."""
    found: list[Variant] = [(network, changed, method, {"method": method, **settings}) for method in ("none", "bn")]
    return [*found, *((network, changed, form, {"vcl": base, **settings}) for form, base in BASE.items())]


def run(options: argparse.Namespace, console: Console) -> None:
    """Do the study; write ``sensitivity``."""
    quick = options.quick
    shared = {"dataset": "digits", "images": 200 if quick else 400, "epochs": 1 if quick else 25, "batch": 100}
    seeds = options.seeds or (1 if quick else 20)
    units: list[Record] = [
        {**shared, "network": network, "seed": seed, "split": seed, "changed": changed, "value": value, **settings}
        for network, fewer in (("multilayer", 1), ("multilayer-12", 1), ("demo", 2))  # a convolution costs more
        for seed in range(max(1, seeds // fewer))
        for network_of, changed, value, settings in variants()
        if network_of == network
    ]
    path = options.out / "sensitivity.jsonl"
    records = do(units, work, path, console, processes=options.processes, minutes=options.minutes)
    rows = [{k: v for k, v in record.items() if k != "vcl"} for record in records]
    results.write("sensitivity", rows, shared, options.out)


def work(unit: Record) -> Record:
    """Train once under the variant."""
    asked = {"data_dir": None, "activation": "elu", "k": 1.0, "device": "cpu", "method": "vcl-ratio"}
    return images.work({**asked, **unit}, {"unit": "channel", **unit.get("vcl", {})})

"""The runs of the plan: plain values, in the order in which the queue takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

Rates = dict[str, float]


class Method(NamedTuple):
    """What a method changes in the network and its loss."""

    label: str
    norm: str | None = None  # "batch" or "group"
    vcl: dict[str, Any] | None = None  # settings of attach
    activation: str = "elu"
    he: bool = False  # He's initialisation; else PyTorch's default with biases 0, as in the authors' code
    rate_of: str = ""  # the method of stage 0 whose learning rate it takes


VCL: dict[str, Any] = {
    "form": "ratio",
    "unit": "activation",
    "beta_mode": "learned",
    "sub_batch_size": 5,
    "num_sub_batches": 2,
    "weight": 0.01,
}
METHODS = {
    "none": Method("no normalisation", rate_of="none"),
    "bn": Method("batch norm", norm="batch", rate_of="bn"),
    "vcl": Method("VCL", vcl=VCL, rate_of="vcl"),
    "vcl-channel": Method("VCL, channel units", vcl=VCL | {"unit": "channel"}, rate_of="vcl"),
    "vcl-weight-0.1": Method("VCL, weight 0.1", vcl=VCL | {"weight": 0.1}, rate_of="vcl"),
    "none-he": Method("no normalisation, He's initialisation", he=True, rate_of="none"),
    "vcl-he": Method("VCL, He's initialisation", vcl=VCL, he=True, rate_of="vcl"),
    "none-relu": Method("no normalisation, ReLU", activation="relu", rate_of="none"),
    "bn-relu": Method("batch norm, ReLU", norm="batch", activation="relu", rate_of="bn"),
    "vcl-relu": Method("VCL, ReLU", vcl=VCL, activation="relu", rate_of="vcl"),
    "gn": Method("group norm", norm="group", rate_of="bn"),
}
BASE = ("none", "bn", "vcl")
VARIANTS = tuple(method for method in METHODS if method not in BASE)
LEARNING_RATES = (0.05, 0.02, 0.1)
HELD_OUT = 5000  # training images that stage 0 is scored on


@dataclass(frozen=True)
class Run:
    """One training. ``learning_rate`` is None until stage 0 has chosen it."""

    stage: str
    dataset: str
    method: str
    seed: int  # of initialisation, order, augmentation and dropout
    learning_rate: float | None
    epochs: int
    k: float
    held_out: float | None = None  # a number of training images, or a share: what is scored in place of the test set

    @property
    def name(self) -> str:
        rate = f"-rate{self.learning_rate}" if self.stage == "0" else ""
        return f"{self.stage}-{self.dataset}-{self.method}{rate}-seed{self.seed}"


def planned(rates: Rates, *, quick: bool = False) -> Iterator[Run]:
    """Yield every run of the plan, stage by stage, then seed by seed.

    ``rates`` are those chosen so far; ``quick``: of networks that learn nothing, to see that all runs.
    """
    tuned = Run("0", "cifar10", "", 0, None, epochs=20, k=0.25, held_out=HELD_OUT)
    tuned = replace(tuned, epochs=6, k=0.02, held_out=0.2) if quick else tuned
    yield from (replace(tuned, method=m, learning_rate=rate) for m in BASE for rate in LEARNING_RATES)
    long = replace(tuned, epochs=3 * tuned.epochs, held_out=None)
    for stage, dataset, methods, seeds in (
        ("1", "cifar10", BASE, 8),
        ("1b", "cifar10", VARIANTS, 3),
        ("2", "cifar100", BASE, 4),
    ):
        for seed in range(seeds):
            for method in methods:
                rate = rates.get(METHODS[method].rate_of)
                yield replace(long, stage=stage, dataset=dataset, method=method, seed=seed, learning_rate=rate)


def chosen(scores: dict[str, tuple[float, float]]) -> Rates:
    """Return the learning rate of each method whose runs of stage 0 are all done.

    ``scores`` has error and negative log-likelihood, on the images held out after the last epoch, by the run's name.
    The lowest error decides, among equal ones the lower likelihood.
    """
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for run in planned({}):
        if run.stage == "0" and run.name in scores and run.learning_rate is not None:
            found.setdefault(run.method, {})[run.learning_rate] = scores[run.name]
    whole = {method: rates for method, rates in found.items() if len(rates) == len(LEARNING_RATES)}
    return {method: min(rates, key=lambda rate: rates[rate]) for method, rates in whole.items()}

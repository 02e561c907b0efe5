"""The methods that the study of defaults compares."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..methods import ALL

BETAS: dict[str, dict[str, Any]] = {
    "1": {"beta_mode": "learned", "beta_init": 1.0},
    "first batch": {"beta_mode": "learned", "beta_init": "example"},  # the example is the first batch
    "running": {"beta_mode": "running"},
}
FIXED = {"beta_mode": "fixed", "beta_init": 1.0}  # tried afterwards
UNITS, WEIGHTS, SIZES = ("channel", "activation"), (0.01, 0.03, 0.1), (5, 10)


class Setting(NamedTuple):
    """A method; where it is no VCL, the name alone says all."""

    method: str  # "none", "bn", "ratio", "relative_variance"
    unit: str = ""
    beta: str = ""
    weight: float = 0.0
    n: int = 0
    pairs: str = ""  # "one" or "all"

    @property
    def vcl(self) -> dict[str, Any] | None:
        """What ``vk.attach`` is asked for; None without VCL."""
        if self.method in ("none", "bn"):
            return None
        shared = {"form": self.method, "unit": self.unit, "weight": self.weight, "sub_batch_size": self.n}
        if self.method == "relative_variance":
            return shared | {"beta_mode": "fixed", "beta_init": 1e-3}
        return (
            shared | {**BETAS, "1, fixed": FIXED}[self.beta] | ({"num_sub_batches": ALL} if self.pairs == "all" else {})
        )

    def __str__(self) -> str:
        """Name it in a table."""
        if self.vcl is None:
            return {"none": "no normalisation", "bn": "batch norm"}[self.method]
        beta = f", β {self.beta}" if self.method == "ratio" else ""
        pairs = ", all pairs" if self.method == "ratio" and self.pairs == "all" else ""
        return f"{self.method}, {self.unit} units{beta}, weight {self.weight:g}, n = {self.n}{pairs}"


NONE, BATCH_NORM = Setting("none"), Setting("bn")
TODAY = Setting("ratio", "channel", "1", 0.01, 5, "one")
AUTHORS = TODAY._replace(unit="activation")
AFTERWARDS = {AUTHORS._replace(beta="1, fixed"): AUTHORS}  # what was tried after phase 2, and beside what
SETTINGS = (
    *(Setting("ratio", u, b, w, n, "one") for n in SIZES for w in WEIGHTS for b in BETAS for u in UNITS),
    *(Setting("ratio", u, b, 0.03, 5, "all") for b in BETAS for u in UNITS),
    *(Setting("relative_variance", u, "1e-3", w, 5, "all") for w in WEIGHTS for u in UNITS),
)

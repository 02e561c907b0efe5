"""What is decided where: launches whose settings are free, and the settings next to those that a rule chooses."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.launches import AXES, Job, Recorded, activation_jobs, loss_jobs, recorded, spec_of, tile_of, values_of
from vcl_kernels.backends.triton import apply, finalise, fused, moments, multiply
from vcl_kernels.backends.triton.launch import Settings, power_of_2

FREE = {  # axes of a tile that a launch can choose
    moments: ("NB", "RB", "MB", "UB", "FB"),
    apply: ("NB", "RB", "MB", "UB", "FB"),
    fused: ("UB", "FB"),
    finalise: ("SB", "UB"),
    multiply: ("EB",),
}
MOST_ELEMENTS, MOST_WARPS = 32768, 16


class Decision(NamedTuple):
    """The settings of one kernel, in one call on one case."""

    module: ModuleType
    case: Case
    form: str
    call: str

    def __str__(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}: {self.form}, {self.call} of {self.case}"

    def job(self, x: Tensor) -> Job:
        """The call on ``x``."""
        spec = spec_of(x, self.form)
        return {**loss_jobs(x, spec), **activation_jobs(x, spec, "elu")}[self.call]

    def with_settings(self, settings: Settings) -> Any:
        """In this context the kernel is launched with ``settings``."""
        return mock.patch.object(self.module, "plan", functools.partial(self.module.plan, settings=settings))

    def recorded(self, x: Tensor) -> Recorded:
        """This kernel's launch in the call, not run."""
        kernels = list(vars(self.module).values())
        return next(one for one in recorded(self.job(x)) if one.launch.kernel in kernels)


ALL, PAIR = "relative_variance", "ratio"
LOSS, DIFFERENTIATED, BACKWARD, ONE_PASS = "loss", "loss, to be differentiated", "dx of loss", "loss and dx"
ELU, ELU_BACKWARD = "elu", "dx of elu and loss"


def on_gpu() -> list[Decision]:
    """In order of what depends on them."""
    layouts = ("contiguous", "channels_last")
    large = [Case((64, 256, 56, 56), layout, dtype) for dtype in ("bfloat16", "float32") for layout in layouts]
    small = [Case(shape, layout, "bfloat16") for shape in ((64, 512, 28, 28), (64, 2048, 7, 7)) for layout in layouts]
    one_pass = [
        *(Case((64, 512, 14, 14), dtype=dtype) for dtype in ("float32", "bfloat16")),
        *(Case((64, 2048, 7, 7), dtype=dtype) for dtype in ("float32", "bfloat16")),
        *(Case((256, 8192), dtype=dtype) for dtype in ("float32", "bfloat16")),
        Case((64, 192, 16, 16)),
    ]
    return [
        *(Decision(moments, case, ALL, ELU) for case in large),
        *(Decision(fused, case, ALL, ONE_PASS) for case in one_pass),
        *(Decision(apply, case, ALL, ELU_BACKWARD) for case in large),
        *(Decision(moments, case, ALL, DIFFERENTIATED) for case in large),
        *(Decision(moments, case, PAIR, ELU) for case in small),
        *(Decision(apply, case, PAIR, ELU_BACKWARD) for case in small),
        *(Decision(finalise, case, form, ELU) for case in large[:2] for form in (PAIR, ALL)),
        *(Decision(apply, case, ALL, BACKWARD) for case in large),
        Decision(multiply, one_pass[0], ALL, "dx times g"),
        *(Decision(moments, case, PAIR, LOSS) for case in large),
        *(Decision(moments, Case((4096, 8192), dtype=dtype), ALL, ELU) for dtype in ("bfloat16", "float32")),
        *(Decision(apply, Case((4096, 8192), dtype=dtype), ALL, ELU_BACKWARD) for dtype in ("bfloat16", "float32")),
    ]


def rehearsed() -> list[Decision]:
    """One of each kernel, tiny."""
    tiny, wide = Case((16, 4, 6, 6)), Case((16, 8, 4, 4), "channels_last")
    return [
        Decision(moments, wide, ALL, ELU),
        Decision(fused, tiny, ALL, ONE_PASS),
        Decision(apply, tiny, ALL, ELU_BACKWARD),
        Decision(finalise, wide, PAIR, LOSS),
        Decision(multiply, tiny, ALL, "dx times g"),
    ]


def chosen(one: Recorded, module: ModuleType) -> Settings:
    """The settings of a launch as a plain value."""
    values, tile = values_of(one), tile_of(one.launch)
    if "run_units" in values:
        tile["UB"] = values["run_units"]
    splits = values["splits"] if module is moments else 1
    if module is apply:
        splits = values["parts"]
    if module is finalise:
        splits = 1 if one.launch.constants["REDUCE"] else 2
    return Settings(tile, one.launch.warps, splits)


def neighbours(one: Recorded, module: ModuleType) -> list[Settings]:
    """The settings of a launch first; then half and twice its warps, axes, splits; and one axis for another."""
    rule, sizes = chosen(one, module), values_of(one)
    axes = [axis for axis in FREE[module] if axis in rule.tile]
    found = [rule, *(rule._replace(warps=warps) for warps in (2 * rule.warps, rule.warps // 2))]
    for axis in axes:
        for tile in _doubled_and_halved(rule.tile, axis):
            factor = tile[axis] / rule.tile[axis]
            found += [rule._replace(tile=tile, warps=int(rule.warps * f)) for f in (1, factor)]
            for other in axes:
                if other != axis and factor == 2:
                    found.append(rule._replace(tile={**tile, other: tile[other] // 2}))
    if module in (moments, apply):  # of finalise they say whether one program adds the units
        found += [rule._replace(splits=splits) for splits in (2 * rule.splits, rule.splits // 2)]
    return [
        settings
        for index, settings in enumerate(found)
        if settings not in found[:index] and _fits(settings, rule, sizes)
    ]


def _doubled_and_halved(tile: dict[str, int], axis: str) -> list[dict[str, int]]:
    together = (axis, "FB") if axis == "UB" and "FB" in tile else (axis,)  # units share a run
    return [
        {**tile, **{name: 2 * tile[name] for name in together}},
        {**tile, **{name: tile[name] // 2 for name in together}},
    ]


def _fits(settings: Settings, rule: Settings, sizes: dict[str, Any]) -> bool:
    tile = settings.tile
    most = {axis: sizes[AXES[axis]] for axis in tile}
    if "FB" in tile:
        most["FB"] = tile["UB"] * sizes["P"]
        if tile["UB"] > 1 and tile["FB"] < most["FB"]:
            return False  # units that share a tile have it whole
    if not all(1 <= size <= max(power_of_2(most[axis]), rule.tile[axis]) for axis, size in tile.items()):
        return False
    elements = math.prod(size for axis, size in tile.items() if axis != "UB" or "FB" not in tile)
    return elements <= MOST_ELEMENTS and 1 <= settings.warps <= MOST_WARPS and settings.splits >= 1

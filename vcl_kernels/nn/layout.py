"""Where attach puts VCL: the VCLs of the chosen modules, and the rows of the handle's table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..options import Activation
from .choose import Choice
from .doubts import written
from .functions import FunctionCall
from .fused import Calls, fuse, put_before, put_behind
from .modules import VCL, VCLActivation
from .probe import Call, Probed, why_not
from .recognise import Recognised, is_activation
from .steering import Steering
from .table import LEFT_OUT, Row

__all__ = ["Layout"]


class Layout:
    """The VCLs of chosen modules, and the rows of the table."""

    def __init__(
        self, settings: dict[str, Any], channel_dim: int | None, shared_beta: bool, steering: Steering
    ) -> None:
        self.settings, self.channel_dim, self.shared_beta, self.steering = settings, channel_dim, shared_beta, steering
        self.calls: dict[str, Calls] = {}
        self.put: list[Callable[[], list[Callable[[], Any]]]] = []  # each changes the model and returns what undoes it
        self.rows: list[Row] = []
        self.reached: dict[str, list[Call]] = {}
        self.missed: list[str] = []
        self.strangers: list[str] = []

    def add(
        self,
        name: str,
        module: nn.Module,
        probed: Probed | None,
        recognised: Recognised | None,
        *,
        behind: bool = False,
        named: bool = False,
    ) -> None:
        """Make the VCLs of ``module``, or a row that says why it gets none."""
        seen = [] if probed is None else probed.calls.get(module, [])
        kind = type(module).__name__
        refusal = next(filter(None, (why_not(call.x) for call in seen)), None)
        if refusal is not None and (behind or named):
            raise ValueError(f"{'after' if behind else 'layers'} names {name!r}, which has {refusal}")
        if refusal is not None:
            self.rows.append(Row(name, kind, LEFT_OUT, refusal))
            return
        fused = None if recognised is None or behind or any(call.inputs != 1 for call in seen) else recognised.fused
        if seen:
            self.reached[name] = seen
            betas = [call.beta for call in seen]
            if self.shared_beta and None not in betas:  # the geometric mean: a scale
                betas = [math.exp(statistics.fmean(math.log(beta) for beta in betas if beta))] * len(betas)
            vcls = [
                self._vcl(fused, self.channel_dim or call.channel_dim, beta).materialize(call.x)
                for call, beta in zip(seen, betas, strict=True)
            ]
            vcls = [_shared(name, vcls)] if self.shared_beta else vcls
        else:
            self.missed += [name]
            vcls = [self._vcl(fused, self.channel_dim or 1)]
        calls = self.calls[name] = Calls(vcls, self.steering, name, self.shared_beta)
        if fused is not None:
            how, put = "fused", partial(fuse, module, calls)
            kind += "" if kind.lower() == fused.name.replace("_", "") else f" ({fused.name})"
        elif behind:
            how, put = "after", partial(put_behind, module, calls)
        else:
            copies = recognised is not None and recognised.in_place and not getattr(module, "inplace", False)
            how, put = "before", partial(put_before, module, calls, copies=copies)
        self.put.append(put)
        self.rows += [Row(vcl.place, kind, how, "") for vcl in vcls]

    def _vcl(self, fused: Activation | None, channel_dim: int, beta: float | None = None) -> VCLActivation:
        settings = {**self.settings, "channel_dim": channel_dim} | ({} if beta is None else {"beta_init": beta})
        vcl = VCL(**settings) if fused is None else VCLActivation("identity", **settings)
        if fused is not None:
            vcl.activation = Activation(*fused)  # of its own: compiled code checks what is shared, and slowly
        if beta is not None and vcl.beta_mode == "fixed":
            vcl.save_beta()
        return vcl

    def add_unreachable(self, model: nn.Module, probed: Probed, choice: Choice) -> list[str]:
        """Add rows for activations that VCL cannot reach; return those that are functions."""
        names = {module: name for name, module in model.named_modules()}
        behind = set(choice.behind.values())

        def out_of_reach(call: FunctionCall) -> bool:  # neither served by after= nor a part of an activation
            return call.owner not in activations and behind.isdisjoint(call.sources)

        activations = set(choice.recognised)
        for module, call in probed.strangers.items():
            if call.owner in activations or is_activation(module):
                activations.add(module)
                if out_of_reach(call):
                    self.strangers += written([call], names, activations)
        functions = written(list(filter(out_of_reach, probed.functions)), names, activations)
        self.rows += [Row("-", stranger, LEFT_OUT, "not in the model") for stranger in self.strangers]
        self.rows += [Row("-", function, LEFT_OUT, "a function") for function in functions]
        return functions


def _shared(name: str, vcls: list[VCLActivation]) -> VCLActivation:
    """Return one VCL for all calls of a module."""
    shapes = {tuple(vcl.beta.shape) for vcl in vcls if vcl.beta is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"shared_beta wants the same units in each call; those of {name!r} have betas of shapes "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    if len({vcl.channel_dim for vcl in vcls}) > 1:
        raise ValueError(f"shared_beta wants channels in the same dimension in each call of {name!r}; set channel_dim=")
    return vcls[0]

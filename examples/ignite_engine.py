"""A trainer of pytorch-ignite with VCL and accumulated gradients, on handwritten digits.

    pip install pytorch-ignite scikit-learn
    python examples/ignite_engine.py

With ``gradient_accumulation_steps=k`` ignite divides what the loss function returns by k. Two ways add VCL:

- ``attach(..., inject=True)`` and ``handle.accumulation = k``. The trainer stays as it is, and reports the loss
  without VCL. With ``amp_mode="amp", scaler=scaler`` also set ``handle.grad_scaler = scaler``. With ``scaler=True``
  ignite makes one: ``trainer.state.scaler``.
- A loss function that adds ``handle.loss()``. ignite divides, scales and reports the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk


def main(epochs: int = 20, accumulation: int = 2, inject: bool = True) -> float:
    """Return the part of the test images that is classified correctly."""
    torch.manual_seed(0)
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 10))
    handle = vk.attach(model, x[:2], inject=inject)
    if inject:
        handle.accumulation = accumulation

    def objective(output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels) + handle.loss()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = create_supervised_trainer(
        model, optimizer, F.cross_entropy if inject else objective, gradient_accumulation_steps=accumulation
    )
    evaluator = create_supervised_evaluator(model, metrics={"accuracy": Accuracy()})

    @trainer.on(Events.ITERATION_COMPLETED(every=100))  # before an evaluation: handle.losses is empty after it
    def log(engine: Any) -> None:
        losses = ", ".join(f"{layer} {float(loss):.4f}" for layer, loss in handle.losses.items())
        print(f"step {engine.state.iteration}: loss {engine.state.output:.3f}, VCL of layers {losses}")

    trainer.run(DataLoader(TensorDataset(x[:1200], y[:1200]), 50, shuffle=True, drop_last=True), max_epochs=epochs)
    return evaluator.run(DataLoader(TensorDataset(x[1200:], y[1200:]), 100)).metrics["accuracy"]


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")

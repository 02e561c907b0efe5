"""VCL in a loop of accelerate, on handwritten digits, with accumulated gradients. One line is new: attach.

Run: accelerate launch examples/accelerate_loop.py, or python examples/accelerate_loop.py
"""

from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vcl_kernels.integrations.accelerate import attach


def network() -> nn.Module:
    body = nn.Conv2d(1, 32, 3, padding=1), nn.ELU(), nn.Conv2d(32, 32, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)
    head = nn.Conv2d(32, 64, 3, padding=1), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*body, *head)


def main(epochs: int = 10, images: int = 1000, **settings: Any) -> float:
    """Train with ``Accelerator(**settings)``. Return the test error in %."""
    accelerator = Accelerator(gradient_accumulation_steps=2, **settings)
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    train, test = train_test_split(range(len(x)), train_size=images, stratify=digits.target, random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    # VCL needs 10 rows, two sub-batches of 5. The last batch of an epoch can have fewer.
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=10, shuffle=True, drop_last=True)
    test_loader = DataLoader(TensorDataset(x[test], y[test]), batch_size=100)

    model = network()
    handle = attach(accelerator, model, x[:1])  # before prepare
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)

    for epoch in range(1, epochs + 1):
        model.train()
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)  # with VCL, divided and scaled as the loss
                optimizer.step()
                optimizer.zero_grad()
        vcl = float(handle.loss())  # of the last batch, detached; 0 after an evaluation
        model.eval()
        with torch.no_grad():
            pairs = [accelerator.gather_for_metrics((model(x).argmax(1), y)) for x, y in test_loader]
        error = 100 * float(torch.cat([predicted != labels for predicted, labels in pairs]).float().mean())
        accelerator.print(f"epoch {epoch}: cross-entropy {loss.item():.3f}, VCL {vcl:.3f}, test error {error:.2f} %")
    return error


if __name__ == "__main__":
    main()

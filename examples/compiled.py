"""VCL with torch.compile: attach it, then compile the model. VCL becomes a part of the compiled graph.

Run: python examples/compiled.py (the first step compiles, which takes some seconds)
"""

import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ELU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def main(epochs: int = 20, images: int = 1000, backend: str = "inductor") -> float:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1)
    y = torch.tensor(digits.target, device=device)
    train, test = train_test_split(range(len(x)), train_size=images, stratify=digits.target, random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    # Batches of one size: another one would be compiled anew
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=50, shuffle=True, drop_last=True)

    model = network().to(device)
    handle = vk.attach(model, x[:1])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        for inputs, labels in loader:
            loss = F.cross_entropy(compiled(inputs), labels) + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        model.eval()
        with torch.no_grad():  # uncompiled: evaluation would be compiled once more
            wrong = model(x[test]).argmax(1) != y[test]
        error = 100 * float(wrong.float().mean())
        print(f"epoch {epoch}: test error {error:.2f} %, trained in {seconds:.1f} s")
    return error


if __name__ == "__main__":
    main()

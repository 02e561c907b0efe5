"""VCL in a plain PyTorch loop, on handwritten digits: attach it to the model, then add its loss to the objective.

Run: python examples/plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
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


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the test error in %."""
    model.eval()
    return 100 * float((model(x).argmax(1) != y).float().mean())


def main(epochs: int = 20, images: int = 1000) -> float:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1)
    y = torch.tensor(digits.target, device=device)
    train, test = train_test_split(range(len(x)), train_size=images, stratify=digits.target, random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    # VCL needs 10 rows, two sub-batches of 5. The last batch of an epoch can have fewer.
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=20, shuffle=True, drop_last=True)

    model = network().to(device)
    handle = vk.attach(model, x[:1])
    print(handle)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    for epoch in range(1, epochs + 1):
        model.train()
        for inputs, labels in loader:
            cross_entropy = F.cross_entropy(model(inputs), labels)
            vcl = handle.loss()
            optimizer.zero_grad()
            (cross_entropy + vcl).backward()
            optimizer.step()
        # Losses of the epoch's last batch
        losses = f"cross-entropy {cross_entropy.item():.3f}, VCL {vcl.item():.3f}"
        print(f"epoch {epoch}: {losses}, test error {error(model, x[test], y[test]):.2f} %")
    return error(model, x[test], y[test])


if __name__ == "__main__":
    main()

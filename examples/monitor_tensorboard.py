"""Watch what VCL does: VCLMonitor writes each layer's variance and VCL's share of the gradient to TensorBoard and CSV.

Run: python examples/monitor_tensorboard.py, then tensorboard --logdir out/monitor
"""

import time
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk


def network() -> nn.Module:
    hidden = [nn.Sequential(nn.Linear(inputs, outputs), nn.ELU()) for inputs, outputs in pairwise([30, 64, 64, 64, 64])]
    return nn.Sequential(*hidden, nn.Linear(64, 2))


def main(epochs: int = 20, folder: str | Path = "out/monitor") -> tuple[float, Path]:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples, diagnoses = load_breast_cancer(return_X_y=True)
    x = torch.tensor(samples, dtype=torch.float32, device=device)
    y = torch.tensor(diagnoses, device=device)
    train, test = train_test_split(range(len(x)), train_size=400, stratify=diagnoses, random_state=0)
    x = (x - x[train].mean(0)) / x[train].std(0)
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=40, shuffle=True, drop_last=True)

    model = network().to(device)
    handle = vk.attach(model, x[:1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # A folder for each run: the monitor would continue a file that exists
    run = Path(folder) / time.strftime("%Y%m%d-%H%M%S")
    run.mkdir(parents=True, exist_ok=True)
    with vk.VCLMonitor(model, every=5, csv=run / "monitor.csv", tensorboard=run) as monitor:
        for epoch in range(1, epochs + 1):
            model.train()
            for inputs, labels in loader:
                loss = F.cross_entropy(model(inputs), labels) + handle.loss()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            monitor.flush()  # writes the epoch, so that TensorBoard shows it while the next one runs
            model.eval()
            with torch.no_grad():
                error = 100 * float((model(x[test]).argmax(1) != y[test]).float().mean())
            print(f"epoch {epoch}: test error {error:.1f} %")

    print(f"monitor.csv and TensorBoard's file are in {run}")
    for row in monitor.rows[-len(handle.layers) :]:
        variance, scale, share = row["variance"], row["scale"], row["share"]
        print(f"layer {row['layer']}: variance {variance:.2f}, VCL pulls it to {scale:.2f}; share {share:.3f}")
    return error, run


if __name__ == "__main__":
    main()

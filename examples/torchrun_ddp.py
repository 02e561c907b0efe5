"""VCL with DistributedDataParallel: each process computes it on its own part of the batch, and it sends nothing.

Run: torchrun --nproc-per-node 2 examples/torchrun_ddp.py (gloo on CPUs, NCCL on GPUs)
"""

import os

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

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


def main(epochs: int = 20, images: int = 1000) -> float:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    train, test = train_test_split(range(len(x)), train_size=images, stratify=digits.target, random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    dataset = TensorDataset(x[train], y[train])
    sampler: DistributedSampler = DistributedSampler(dataset, drop_last=True)
    # Each process needs 10 rows of its own for VCL, two sub-batches of 5
    loader = DataLoader(dataset, batch_size=25, sampler=sampler, drop_last=True)

    model = network().to(device)
    handle = vk.attach(model, x[:1].to(device))  # before the wrap
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        wrapped.train()
        for inputs, labels in loader:
            loss = F.cross_entropy(wrapped(inputs.to(device)), labels.to(device)) + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            wrong = model(x[test].to(device)).argmax(1).cpu() != y[test]
        error = 100 * float(wrong.float().mean())
        if distributed.get_rank() == 0:
            print(f"epoch {epoch}: test error {error:.2f} %")
    distributed.destroy_process_group()
    return error


if __name__ == "__main__":
    main()

"""VCL in Lightning's Trainer, on handwritten digits: one callback. The LightningModule stays as it is.

Run: python examples/lightning_callback.py
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vcl_kernels.integrations.lightning import VCLCallback


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 8, 8)  # attach looks at the network with it
        body = nn.Conv2d(1, 32, 3, padding=1), nn.ELU(), nn.Conv2d(32, 32, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)
        head = nn.Conv2d(32, 64, 3, padding=1), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
        self.net = nn.Sequential(*body, *head)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss, prog_bar=True)  # of the task alone: VCL is in the gradient
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        inputs, labels = batch
        self.log("test_error", 100 * (self(inputs).argmax(1) != labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs: int = 10, images: int = 1000, folder: str = "out", **settings: Any) -> float:
    """Return the test error in %."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    train, test = train_test_split(range(len(x)), train_size=images, stratify=digits.target, random_state=0)
    x = (x - x[train].mean()) / x[train].std()
    # VCL needs 10 rows, two sub-batches of 5. The last batch of an epoch can have fewer.
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=20, shuffle=True, drop_last=True)
    test_loader = DataLoader(TensorDataset(x[test], y[test]), batch_size=len(test))

    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[VCLCallback(weight=0.01, warmup_steps=100)],
        logger=CSVLogger(folder),  # with vcl_loss, and each layer's loss, beta and variance
        default_root_dir=folder,
        log_every_n_steps=10,
        **settings,
    )
    trainer.fit(Classifier(), loader, test_loader)
    return float(trainer.callback_metrics["test_error"])


if __name__ == "__main__":
    print(f"test error {main():.2f} %")

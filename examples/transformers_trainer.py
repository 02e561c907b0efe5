"""VCL in the Trainer of transformers: VCLTrainer replaces it. A small vision transformer learns digits.

Run: python examples/transformers_trainer.py
"""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import EvalPrediction, TrainingArguments, ViTConfig, ViTForImageClassification

from vcl_kernels.integrations.transformers import VCLTrainer


def samples(images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"pixel_values": torch.tensor(image, dtype=torch.float32).unsqueeze(0), "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]


def test_error(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    return {"error": 100 * float((logits.argmax(1) != prediction.label_ids).mean())}


def main(epochs: int = 20, images: int = 1200, folder: str = "out/transformers", **settings: Any) -> float:
    """Return the test error in %."""
    torch.manual_seed(0)
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images / 8 - 1, digits.target, train_size=images, stratify=digits.target, random_state=0
    )
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=10,
    )
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=25,
        gradient_accumulation_steps=2,  # VCL is averaged over the two batches
        dataloader_drop_last=True,  # VCL needs 10 rows, two sub-batches of 5
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        **settings,
    )
    trainer = VCLTrainer(
        ViTForImageClassification(config),
        arguments,
        train_dataset=samples(x_train, y_train),
        eval_dataset=samples(x_test, y_test),
        compute_metrics=test_error,
        vcl={"weight": 0.01, "warmup_steps": 50},  # vcl_loss is logged
    )
    trainer.train()
    return trainer.evaluate()["eval_error"]


if __name__ == "__main__":
    print(f"test error {main():.2f} %")

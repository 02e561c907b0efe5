"""A classifier of skorch with VCL, whose weight a grid search chooses, on handwritten digits.

    pip install skorch scikit-learn
    python examples/skorch_classifier.py

skorch makes the module anew in each ``fit``, and then the optimizer. So attach where the module is made: at the end of
its ``__init__``, or in a function that is given to skorch as the module, as here. Its arguments are parameters of the
classifier, ``module__weight``. ``inject=True`` leaves skorch's steps as they are.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

import vcl_kernels as vk
from vcl_kernels.options import BetaMode


def network(width: int = 64, weight: float = 0.01, beta_mode: BetaMode | None = None) -> nn.Module:
    """Return a new network with VCL attached."""
    net = nn.Sequential(nn.Linear(64, width), nn.ELU(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, 10))
    vk.attach(net, torch.zeros(2, 64), weight=weight, beta_mode=beta_mode, inject=True)
    return net


def main(epochs: int = 20, weights: tuple[float, ...] = (0.0, 0.01, 0.1), folds: int = 3) -> float:
    """Choose the weight. Return the part of the test images that is classified correctly."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x = (x / 8 - 1).astype(np.float32)
    classifier = NeuralNetClassifier(
        network,
        criterion=nn.CrossEntropyLoss,
        optimizer__momentum=0.9,
        optimizer__weight_decay=1e-4,
        optimizer__param_groups=[("*.vcl.*.beta", {"weight_decay": 0.0})],  # if they are learned
        lr=0.1,
        batch_size=50,
        max_epochs=epochs,
        train_split=None,
        iterator_train__shuffle=True,
        iterator_train__drop_last=True,
        verbose=0,
    )
    search = GridSearchCV(classifier, {"module__weight": weights}, cv=folds).fit(x[:1200], y[:1200])
    for weight, score in zip(weights, search.cv_results_["mean_test_score"], strict=True):
        print(f"weight {weight}: accuracy in cross-validation {score:.3f}")
    return float(search.score(x[1200:], y[1200:]))


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")

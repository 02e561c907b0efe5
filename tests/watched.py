"""A network for a monitor, the number of hooks on a model, and how close numbers have to be."""

import pytest
from torch import nn

from vcl_kernels import torch_private


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU6(), nn.Linear(6, 2))


def hooks(model):
    attributes = [item for module in model.modules() for item in torch_private.hooks_of(module).items()]
    return sum(len(hooks) for name, hooks in attributes if name.endswith("hooks"))


def close(value):
    return pytest.approx(float(value), rel=1e-4)

"""The networks of the image study."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from examples.demo.learning import Network

from .methods import ACTIVATIONS, multilayer
from .models import elu_11


def build(name: str, example: Tensor, classes: int, method: str, activation: str, k: float) -> nn.Module:
    """Return a network with its normalisation, if that is the method, for images like ``example``.

    Fully connected (``multilayer-12`` has 12 hidden layers), the paper's of width ``k``, a small ResNet, or the demo's
    (ELU).
    """
    inputs = example.shape[1]
    if name.startswith("multilayer"):
        depth = int(name.removeprefix("multilayer").removeprefix("-") or 4)
        layers = multilayer(example[0].numel(), classes, method, activation, depth=depth, width=64)
        return nn.Sequential(nn.Flatten(), *layers)
    batch_norm, act = method == "bn", ACTIVATIONS[activation]
    if name == "elu-11":
        return elu_11(classes, inputs=inputs, k=k, batch_norm=batch_norm, activation=act)
    if name == "resnet":
        return resnet(inputs, classes, batch_norm, act)
    if activation != "elu":
        raise ValueError(f'the demo\'s network has ELU; got activation "{activation}"')
    return Network(inputs, batch_norm, classes)


def resnet(inputs: int, classes: int, batch_norm: bool, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """A ResNet of 8 layers: a 3x3 convolution, three blocks of 16, 32 and 64 channels, a linear layer."""
    return nn.Sequential(
        *convolution(inputs, 16, 1, batch_norm),
        activation(),
        Block(16, 16, 1, batch_norm, activation),
        Block(16, 32, 2, batch_norm, activation),
        Block(32, 64, 2, batch_norm, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; VCL, like batch norm, sees what enters each activation."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, batch_norm: bool, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, stride, batch_norm),
            activation(),
            *convolution(outputs, outputs, 1, batch_norm),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, stride: int, batch_norm: bool) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not batch_norm)
    return [layer, nn.BatchNorm2d(outputs)] if batch_norm else [layer]

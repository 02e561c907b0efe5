"""Networks that are trained, and timed in ``benchmarks.speed``: the paper's 11 layers, ResNet-50 and an MLP.

Each is built with batch norm or without; VCL is attached to one without.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

CHANNELS = (192, 192, 240, 240, 260, 260, 280, 280, 300, 300)  # times k, but for the first where k > 1
KERNELS = (5, 1, 3, 1, 2, 1, 2, 1, 2, 1, 1)
POOLED = (1, 3, 5, 7, 9)  # layers that a 2x2 pooling follows
DROPOUT = {3: 0.1, 5: 0.2, 7: 0.3, 9: 0.4, 10: 0.5}  # after the layer, and after its pooling
BATCH_NORM_EPS = 1e-3
MOST_GROUPS = 8  # of group norm: the most that divide the channels, up to this


def elu_11(
    classes: int = 10,
    *,
    inputs: int = 3,
    k: float = 1.0,
    batch_norm: bool = False,
    group_norm: bool = False,
    activation: Callable[[], nn.Module] = nn.ELU,
) -> nn.Sequential:
    """Ten convolutions with an activation, and a 1x1 convolution to classes, as in the authors' code.

    ``k`` is the width; the paper's, 1 or 2, leave the first layer as it is. Images of 32x32 end as one position.
    Convolutions have a bias under batch norm too.
    """
    layers: list[nn.Module] = []
    before = inputs
    for layer, (channels, kernel) in enumerate(zip(CHANNELS, KERNELS, strict=False), 1):
        width = max(1, round((min(k, 1) if layer == 1 else k) * channels))
        layers.append(nn.Conv2d(before, width, kernel, padding="same"))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width, eps=BATCH_NORM_EPS))
        if group_norm:
            groups = max(n for n in range(1, MOST_GROUPS + 1) if width % n == 0)
            layers.append(nn.GroupNorm(groups, width))
        layers.append(activation())
        if layer in POOLED:
            layers.append(nn.MaxPool2d(2))
        if layer in DROPOUT:
            layers.append(nn.Dropout(DROPOUT[layer]))
        before = width
    return nn.Sequential(*layers, nn.Conv2d(before, classes, KERNELS[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; an activation module for each place."""

    def __init__(self, inputs: int, width: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *_convolution(inputs, width, 1, 1, batch_norm),
            nn.ReLU(),
            *_convolution(width, width, 3, stride, batch_norm),
            nn.ReLU(),
            *_convolution(width, outputs, 1, 1, batch_norm),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride, batch_norm))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, batch_norm: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=not batch_norm)
    return [convolution, nn.BatchNorm2d(outputs)] if batch_norm else [convolution]


def resnet_50(classes: int = 1000, *, batch_norm: bool = False) -> nn.Sequential:
    """ResNet-50 (stages of 3, 4, 6 and 3 bottlenecks). Without batch norm it is a network to time, not to train."""
    layers = [*_convolution(3, 64, 7, 2, batch_norm), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    before = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(count):
            layers.append(Bottleneck(before, width, 2 if stage and block == 0 else 1, batch_norm))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def mlp(
    classes: int = 10,
    *,
    inputs: int = 64,
    depth: int = 4,
    width: int = 64,
    batch_norm: bool = False,
    layer_norm: bool = False,
    activation: Callable[[], nn.Module] = nn.ELU,
) -> nn.Sequential:
    """``depth`` hidden layers of ``width``: linear, normalisation if there is one, activation."""
    layers: list[nn.Module] = []
    for before in [inputs] + [width] * (depth - 1):
        layers.append(nn.Linear(before, width, bias=not batch_norm))  # batch norm has its own bias
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        if layer_norm:
            layers.append(nn.LayerNorm(width))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(width, classes))

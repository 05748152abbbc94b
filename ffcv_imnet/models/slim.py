"""This project's own network: a residual network for short trainings on small images.

What it does differently from ResNet-18, and why. The stem is two 3x3 convolutions instead of one of
7x7 (after arXiv:1812.01187, 4.2); the max-pooling after them stays: a network of the same cost with a
second strided convolution in its place ended 1.8 points lower after two epochs of Imagenette
(records/2026-11-23_slim13). Blocks that halve the image average it first, for both branches: nothing is
aliased, and no blur on four times the pixels is needed (arXiv:1904.11486). There are five blocks where
ResNet-18 has eight, and wide ones: the last features are 8 x 8 for an image of 128 px where its are 4 x 4.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ffcv_imnet.models.registry import register

STEM = (32, 64)  # channels of its convolutions; stride 4 with the pooling
SLIM13 = ((128, 2), (320, 3))  # channels and blocks; the first block of each halves the image


class SlimBlock(nn.Module):
    """relu(shortcut(x) + residual(x)): two 3x3 convolutions, or of half the image's side."""

    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.pool: nn.Module = pool if halve else nn.Identity()
        self.residual = nn.Sequential(
            *_conv(inputs, outputs), nn.ReLU(inplace=True), *_conv(outputs, outputs)
        )
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W), or of half the sides, rounded up."""
        x = self.pool(x)
        return F.relu(self.residual(x) + self.shortcut(x))


class Slim(nn.Module):
    """Stem of stride 4, stages of `SlimBlock`s, mean over the image, linear classifier."""

    def __init__(self, classes: int, stages: tuple[tuple[int, int], ...], zero_gamma: bool) -> None:
        super().__init__()
        first, channels = STEM
        self.stem = nn.Sequential(
            *_conv(3, first, stride=2), nn.ReLU(inplace=True),
            *_conv(first, channels), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        blocks = []
        for outputs, count in stages:
            for index in range(count):
                blocks.append(SlimBlock(channels, outputs, halve=index == 0))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)
        if zero_gamma:
            for block in blocks:
                nn.init.zeros_(block.residual.get_parameter("4.weight"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) -> logits (N, classes)."""
        x = self.blocks(self.stem(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Convolution and BatchNorm, with the initial weights of torchvision's ResNet."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(outputs)


@register
def slim13(classes: int, zero_gamma: bool) -> nn.Module:
    """See the module; fewer FLOPs than ResNet-18 with BlurPool at every resolution."""
    return Slim(classes, SLIM13, zero_gamma)

"""This project's own network: a residual network for small pictures and short trainings.

What it does differently from ResNet-18, and why. The stem is two strided 3x3 convolutions instead of
7x7 and max-pooling: less to compute at the highest resolution, all of it learned (after
arXiv:1812.01187, 4.2). Blocks that halve the picture average it first, for both branches: nothing is
aliased, and no blur on four times the pixels is needed (arXiv:1904.11486). The stages of many pixels
have fewer blocks and the third has more (as in arXiv:2110.00476's and RegNet's, arXiv:2003.13678).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ffcv_imnet.models.registry import register

STEM = (32, 64)
# Channels, blocks, and whether the first block halves the picture.
SLIM18 = ((64, 1, False), (128, 2, True), (320, 3, True))


class SlimBlock(nn.Module):
    """relu(shortcut(x) + residual(x)): two 3x3 convolutions, or of half the picture's side."""

    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.pool: nn.Module = pool if halve else nn.Identity()
        self.residual = nn.Sequential(
            *_conv(inputs, outputs, 3), nn.ReLU(inplace=True), *_conv(outputs, outputs, 3)
        )
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W), or of half the sides, rounded up."""
        x = self.pool(x)
        return F.relu(self.residual(x) + self.shortcut(x))


class Slim(nn.Module):
    """Stem of stride 4, stages of `SlimBlock`s, mean over the picture, linear classifier."""

    def __init__(
        self, classes: int, stages: tuple[tuple[int, int, bool], ...], zero_gamma: bool
    ) -> None:
        super().__init__()
        first, channels = STEM
        self.stem = nn.Sequential(
            *_conv(3, first, 3, 2), nn.ReLU(inplace=True),
            *_conv(first, channels, 3, 2), nn.ReLU(inplace=True),
        )  # fmt: skip
        blocks = []
        for outputs, count, halve in stages:
            for index in range(count):
                blocks.append(SlimBlock(channels, outputs, halve and index == 0))
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


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """Convolution and BatchNorm, with the initial weights of torchvision's ResNet."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv, nn.BatchNorm2d(outputs)


@register
def slim18(classes: int, zero_gamma: bool) -> nn.Module:
    """See the module; fewer operations than ResNet-18 with BlurPool at every resolution."""
    return Slim(classes, SLIM18, zero_gamma)

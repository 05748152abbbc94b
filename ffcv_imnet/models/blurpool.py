"""BlurPool: a fixed blur before every strided convolution (Zhang, arXiv:1904.11486)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_INPUTS = 16  # ffcv-imagenet's rule: the first convolution, on 3 channels, stays as it is


class BlurConv2d(nn.Module):
    """`conv` on a blurred input: depthwise (1, 2, 1) x (1, 2, 1) / 16, zero padding of 1.

    Shapes are those of `conv`, whose parameters it keeps under the name `conv`. A 1x1 convolution
    looks at every second blurred pixel only, so there the blur itself takes the stride.
    """

    kernel: Tensor  # (C, 1, 3, 3)

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        line = torch.tensor([1.0, 2.0, 1.0])
        kernel = (torch.outer(line, line) / 16).expand(conv.in_channels, 1, 3, 3).contiguous()
        self.register_buffer("kernel", kernel, persistent=False)
        self.stride: tuple[int, ...] = (1, 1)
        if conv.kernel_size == (1, 1):
            self.stride, conv.stride = conv.stride, (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> what `conv` makes of it."""
        blurred = F.conv2d(x, self.kernel, None, self.stride, 1, 1, self.conv.in_channels)
        return self.conv(blurred)


def apply_blurpool(model: nn.Module, blurred: type[BlurConv2d] = BlurConv2d) -> None:
    """Put the blur before each strided convolution with at least `MIN_INPUTS` inputs, in place."""
    for name, child in model.named_children():
        if (
            isinstance(child, nn.Conv2d)
            and max(child.stride) > 1
            and child.in_channels >= MIN_INPUTS
        ):
            setattr(model, name, blurred(child))
        else:
            apply_blurpool(child, blurred)

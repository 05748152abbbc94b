"""ResNets (arXiv:1512.03385), torchvision's own: its state dicts load here and ours there."""

import torchvision.models as tv
from torch import nn

from ffcv_imnet.models.registry import register


@register
def resnet18(classes: int, zero_gamma: bool) -> nn.Module:
    """11.7 million parameters at 1,000 classes."""
    return tv.resnet18(num_classes=classes, zero_init_residual=zero_gamma)


@register
def resnet34(classes: int, zero_gamma: bool) -> nn.Module:
    """21.8 million parameters at 1,000 classes."""
    return tv.resnet34(num_classes=classes, zero_init_residual=zero_gamma)


@register
def resnet50(classes: int, zero_gamma: bool) -> nn.Module:
    """25.6 million parameters at 1,000 classes; strides in the 3x3 convolutions (V1.5)."""
    return tv.resnet50(num_classes=classes, zero_init_residual=zero_gamma)

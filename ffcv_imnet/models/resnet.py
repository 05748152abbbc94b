"""ResNets (arXiv:1512.03385), torchvision's own: its state dicts load here and ours there.

torchvision is imported where one is made: it loads torch's compiler, for seconds that no other network needs.
"""

from torch import nn

from ffcv_imnet.models.registry import register


@register
def resnet18(classes: int, zero_gamma: bool) -> nn.Module:
    """11.7 million parameters at 1,000 classes."""
    return _torchvisions("resnet18", classes, zero_gamma)


@register
def resnet34(classes: int, zero_gamma: bool) -> nn.Module:
    """21.8 million parameters at 1,000 classes."""
    return _torchvisions("resnet34", classes, zero_gamma)


@register
def resnet50(classes: int, zero_gamma: bool) -> nn.Module:
    """25.6 million parameters at 1,000 classes; strides in the 3x3 convolutions (V1.5)."""
    return _torchvisions("resnet50", classes, zero_gamma)


def _torchvisions(name: str, classes: int, zero_gamma: bool) -> nn.Module:
    from torchvision.models import get_model

    network: nn.Module = get_model(
        name, weights=None, num_classes=classes, zero_init_residual=zero_gamma
    )
    return network

"""ResNets (arXiv:1512.03385), torchvision's own: its state dicts load here and ours there.

`apply_options` replaces some of their modules afterwards, as BlurPool does: nothing of torchvision's
is copied, and without options the network is torchvision's.
"""

import torchvision.models as tv
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import SqueezeExcitation

from ffcv_imnet.config.schema import Model, Settings
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.models.blurpool import BlurPool2d
from ffcv_imnet.models.registry import register

SQUEEZE = 16  # channels over those between the two layers of squeeze-and-excitation (its 6.4)


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


# ---- options ------------------------------------------------------------------------------------


def options_of(model: Model) -> dict[str, object]:
    """The options of `model` that are not the default, by name."""
    names = ("stem", "shortcut", "squeeze_excite", "antialias_maxpool")
    return {n: v for n in names if (v := getattr(model, n)) != getattr(Settings().model, n)}


def apply_options(network: nn.Module, model: Model) -> None:
    """Change a ResNet with fresh weights in place, as `model` says; before BlurPool.

    Raises:
        UsageError: an option is on and the network is no ResNet.
    """
    options = options_of(model)
    if not options:
        return
    if not isinstance(network, tv.ResNet):
        raise UsageError(
            f"model.{next(iter(options))} is an option of resnet18, resnet34 and resnet50, not of "
            f"model.arch {model.arch}"
        )
    if model.stem == "deep":
        network.conv1 = deep_stem(network.conv1.out_channels)
    if model.antialias_maxpool:
        network.maxpool = nn.Sequential(nn.MaxPool2d(3, 1, 1), BlurPool2d(network.bn1.num_features))
    for block in network.modules():
        if not isinstance(block, BasicBlock | Bottleneck):
            continue
        if model.shortcut == "avgpool" and block.downsample is not None:
            block.downsample[0] = pooled_shortcut(block.downsample[0])
        if model.squeeze_excite:
            last = "bn3" if isinstance(block, Bottleneck) else "bn2"
            setattr(block, last, nn.Sequential(getattr(block, last), excitation(block, last)))


def deep_stem(channels: int) -> nn.Sequential:
    """Three 3x3 convolutions for the one of 7x7 (arXiv:1812.01187, 4.2, "ResNet-C").

    (N, 3, H, W) -> (N, channels, H / 2, W / 2); the last one's BatchNorm is the network's `bn1`.
    """
    half = channels // 2
    return nn.Sequential(
        _conv(3, half, 3, stride=2), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        _conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        _conv(half, channels, 3),
    )  # fmt: skip


def pooled_shortcut(conv: nn.Conv2d) -> nn.Module:
    """Average, then a 1x1 convolution that sees every pixel ("ResNet-D", the same section)."""
    if max(conv.stride) == 1:
        return conv
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, _conv(conv.in_channels, conv.out_channels, 1))


def excitation(block: nn.Module, norm: str) -> nn.Module:
    """Squeeze-and-excitation (arXiv:1709.01507) for the end of the block's residual branch."""
    channels = getattr(block, norm).num_features
    return SqueezeExcitation(channels, channels // SQUEEZE)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, its weights drawn as torchvision's ResNet draws them."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv

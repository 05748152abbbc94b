"""A network of 20,000 parameters, so that the tests spend their time on the project and not on it.

`python -m tests.networks ARGUMENTS` is train_imagenet.py with this network in the registry.
"""

from torch import nn

from ffcv_imnet.models.registry import register
from ffcv_imnet.models.slim import SlimBlock


@register
def tiny(classes: int, zero_gamma: bool) -> nn.Module:
    """Three strided convolutions, BatchNorm, a linear head."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 48)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, classes))


@register
def tiny_residual(classes: int, zero_gamma: bool) -> nn.Module:
    """One residual block."""
    stem = nn.Conv2d(3, 16, 4, stride=4, bias=False)
    return nn.Sequential(
        stem,
        SlimBlock(16, 16, False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


if __name__ == "__main__":
    import train_imagenet
    from ffcv_imnet.core.errors import run_main

    run_main(train_imagenet.main)

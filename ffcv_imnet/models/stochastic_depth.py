"""Stochastic depth: residual branches left out by chance, more often the deeper they lie (arXiv:1603.09382)."""

from typing import cast

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import stochastic_depth

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.models.efficientnet_lite import InvertedResidual
from ffcv_imnet.models.slim import SlimBlock


class DroppedNorm(nn.BatchNorm2d):
    """The BatchNorm that ends a residual branch, and in training for some images zero in its place. Under the
    BatchNorm's own names in the state dict."""

    probability = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), of the same shape."""
        return stochastic_depth(super().forward(x), self.probability, "row", self.training)


def apply_stochastic_depth(network: nn.Module, most: float, arch: str) -> None:
    """In place: the last branch is left out with probability `most`, the ones before it in proportion to their depth.

    Raises:
        UsageError: no residual branch that is known here.
    """
    ends = [end for module in network.modules() if (end := _end_of(module)) is not None]
    if not ends:
        raise UsageError(
            f"model.stochastic_depth: {arch!r} has no residual branch that is known here; "
            "ffcv_imnet/models/stochastic_depth.py lists the blocks"
        )
    for number, (parent, name) in enumerate(ends, 1):
        norm = cast(nn.BatchNorm2d, parent.get_submodule(name))
        dropped = DroppedNorm(norm.num_features, norm.eps, norm.momentum)
        dropped.load_state_dict(norm.state_dict())
        dropped.probability = most * number / len(ends)
        setattr(parent, name, dropped)


def _end_of(module: nn.Module) -> tuple[nn.Module, str] | None:
    """Where the last BatchNorm of a block's residual branch stands; None of what is no such block."""
    if isinstance(module, BasicBlock):
        return module, "bn2"
    if isinstance(module, Bottleneck):
        return module, "bn3"
    if isinstance(module, SlimBlock):
        return module.residual, "4"
    if isinstance(module, InvertedResidual) and module.residual:
        return module, "_bn2"
    return None

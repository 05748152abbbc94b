"""Networks: a registry of constructors, and what every one of them is wrapped in."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ffcv_imnet.config.schedules import resolutions
from ffcv_imnet.config.schema import MEAN, STD, Settings
from ffcv_imnet.core.errors import UsageError, reason_of

# They register their networks.
from ffcv_imnet.models import efficientnet_lite, resnet, slim  # noqa: F401
from ffcv_imnet.models.blurpool import apply_blurpool
from ffcv_imnet.models.registry import build


class Normalize(nn.Module):
    """uint8 pixels to zero mean and unit variance, so that loaders move one byte a channel."""

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            channels = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 or float (N, 3, H, W), 0 to 255 -> float32 of the same shape and memory format."""
        return (images - self.mean) / self.std


def build_model(settings: Settings, classes: int) -> nn.Sequential:
    """The network of `settings`, from uint8 pixels (N, 3, H, W) to logits (N, classes).

    Its parameters are those of `torch.manual_seed(training.seed)`. Raises UsageError for an
    unknown `model.arch` or outputs that are no logits.
    """
    torch.manual_seed(settings.training.seed)
    network = build(settings.model.arch, classes, settings.model.zero_gamma)
    if settings.training.use_blurpool:
        apply_blurpool(network)
    if settings.model.stochastic_depth:
        from ffcv_imnet.models.stochastic_depth import apply_stochastic_depth  # see resnet.py

        apply_stochastic_depth(network, settings.model.stochastic_depth, settings.model.arch)
    model = nn.Sequential(Normalize(settings.model.mean, settings.model.std), network)
    for side in {resolutions(settings)[0], resolutions(settings)[-1]}:
        check_outputs(model, classes, side, settings.model.arch)
    return model


def check_outputs(model: nn.Sequential, classes: int, side: int, arch: str) -> None:
    """Show it one black image, so that a mistake in a network is one line and not a lost run.

    Raises UsageError unless the outputs are logits (1, classes).
    """
    device = next(model.buffers()).device
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = model(pixels)
    except Exception as error:
        raise UsageError(
            f"model.arch {arch!r}: an image of {side} px ends in {type(error).__name__}: {reason_of(error)}"
        ) from error
    model.train()
    if not isinstance(outputs, Tensor):
        what = f"a {type(outputs).__name__}"
    elif outputs.shape != (1, classes) or not outputs.is_floating_point():
        what = f"{tuple(outputs.shape)} of {str(outputs.dtype).removeprefix('torch.')}"
    else:
        return
    raise UsageError(
        f"model.arch {arch!r} makes {what} of one image; logits for {classes:,} classes are a "
        f"tensor {(1, classes)}"
    )

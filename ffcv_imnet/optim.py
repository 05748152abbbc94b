"""Parameter groups, the optimizer, and the average of weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ffcv_imnet.settings import Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """All parameters, in two groups: those of two and more dimensions decay, the others do not.

    Biases and BatchNorm's scales and shifts are one-dimensional; told by shape, not by name, none
    is missed (arXiv:1812.01187, 3.1).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """SGD over `parameter_groups`; the loop sets its rate at every step."""
    return torch.optim.SGD(
        parameter_groups(model, settings.weight_decay),
        lr=0.0,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        fused=True,  # reads fp16's overflow flag on the device; the others make the host wait
    )


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """Exponential moving average of weights and buffers, or None for a decay of 0.

    The first update copies the model, so the random start weighs nothing.
    """
    if decay == 0:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

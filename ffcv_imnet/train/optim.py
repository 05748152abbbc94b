"""Parameter groups, the optimizer, and the average of weights."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ffcv_imnet.config.schedules import learning_rate
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.train.muon import MuonSGD, is_kernel
from ffcv_imnet.train.sgd import FusedSGD
from ffcv_imnet.train.soap import SOAP


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All parameters, in two groups: those of two and more dimensions decay, the others do not.

    Biases and BatchNorm's scales and shifts are one-dimensional; told by shape, not by name, none
    is missed (arXiv:1812.01187, 3.1).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module,
    settings: Settings,
    precision: str = "fp32",
    head: Sequence[nn.Module] | None = None,
) -> torch.optim.Optimizer:
    """SGD over `parameter_groups`, `MuonSGD`, or `SOAP`.

    `precision` is the run's; Newton-Schulz follows it from fp32 to bf16, but fp16's range is too
    narrow for it. The loop sets a group's rate at every step: the schedule's times the group's "lr_factor".
    `head`: its modules, which lr.body_lr_mult is not for.
    """
    training, muon, soap = settings.training, settings.muon, settings.soap
    if training.optimizer == "soap":
        groups = parameter_groups(model, soap.weight_decay)
        for group in groups:
            group["lr_factor"] = 1.0
        return SOAP(_by_part(groups, head, settings.lr.body_lr_mult), soap.every)
    groups = parameter_groups(model, training.weight_decay)
    for group in groups:
        group |= {"momentum": training.momentum, "lr_factor": 1.0}
    if training.optimizer == "sgd":
        return FusedSGD(_by_part(groups, head, settings.lr.body_lr_mult), training.nesterov)
    peak = learning_rate(
        settings.lr, training.epochs, settings.lr.lr_peak_epoch, training.batch_size
    )
    kernels = {
        "params": [p for p in groups[0]["params"] if is_kernel(p)],
        "weight_decay": muon.weight_decay,
        "momentum": 0.0,
        "muon_momentum": muon.momentum,
        "ns_steps": muon.ns_steps,
        "lr_factor": muon.lr / peak,
    }
    groups[0]["params"] = [p for p in groups[0]["params"] if not is_kernel(p)]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    groups = _by_part([kernels, *groups], head, settings.lr.body_lr_mult)
    return MuonSGD(groups, training.nesterov, dtype)


def _by_part(
    groups: list[dict[str, Any]], head: Sequence[nn.Module] | None, body_lr_mult: float
) -> list[dict[str, Any]]:
    """The groups, each in two where the body has a factor of its own: what is the body's, what the head's."""
    if body_lr_mult == 1.0 or head is None:
        return groups
    of_head = {id(parameter) for module in head for parameter in module.parameters(recurse=False)}
    split = []
    for group in groups:
        for is_head in (False, True):
            params = [p for p in group["params"] if (id(p) in of_head) is is_head]
            factor = group["lr_factor"] * (1.0 if is_head else body_lr_mult)
            part = "head" if is_head else "body"
            split.append(group | {"params": params, "lr_factor": factor, "part": part})
    return split


class Average(AveragedModel):
    """The exponential moving average (EMA) of weights and BatchNorm statistics, moved by two launches a step.

    torch's `update_parameters` sends its count of updates to the device, for which the host waits, and
    moves each integer on its own. Here integers, the batches that BatchNorm has seen, are copied. The first
    update copies all: the random start weighs nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards `model`, which is on the same device."""
        first = not self.n_averaged  # on the CPU, whatever the network's device
        for floats, ours, theirs in _paired(self.module, model):
            if floats and not first:
                torch._foreach_lerp_(ours, theirs, 1 - self.decay)
            else:
                torch._foreach_copy_(ours, theirs)
        self.n_averaged += 1


def _paired(a: nn.Module, b: nn.Module) -> Iterator[tuple[bool, list[Tensor], list[Tensor]]]:
    """Whether they are floats, and the weights and buffers of both, all that are floats together."""
    pairs = list(zip(*([*m.parameters(), *m.buffers()] for m in (a, b)), strict=True))
    for floats in (True, False):
        of_kind = [pair for pair in pairs if pair[0].is_floating_point() is floats]
        if of_kind:
            yield floats, [ours for ours, _ in of_kind], [theirs for _, theirs in of_kind]


def build_average(model: nn.Module, ema_decay: float) -> Average | None:
    """What keeps the average, or None at a decay of 0."""
    return Average(model, ema_decay) if ema_decay else None

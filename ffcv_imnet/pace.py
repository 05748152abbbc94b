"""How fast the parts of training are, alone and together."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ffcv_imnet.checkpoint import Learner
from ffcv_imnet.data import PADDING, TrainLoader
from ffcv_imnet.distributed import World
from ffcv_imnet.schedules import EpochPlan
from ffcv_imnet.settings import Settings


@dataclass(frozen=True)
class Pace:
    """Images/s of one process at one resolution."""

    resolution: int
    loader: float  # batches as they arrive on the device, nothing done with them
    host: float  # the same without the copy to the device
    model: float  # steps on one batch that stays on the device
    both: float
    flops: float  # of a step, an image; a multiply-add counts as two

    def limit(self) -> str:
        """The slower part; the copy, if the loader is the slower one only because of it."""
        if self.model <= self.loader:
            return "model"
        return "loader" if self.host < 1.1 * self.loader else "host copy"

    def row(self, peak_flops: float | None) -> tuple[str, ...]:
        """For a table; `peak_flops` is the device's, where it is known."""
        used = f"{self.both * self.flops / peak_flops:.1%}" if peak_flops else "peak not known"
        rates = (f"{rate:,.0f}" for rate in (self.loader, self.model, self.both))
        return (str(self.resolution), *rates, self.limit(), used)


def measure(
    side: int,
    plan: EpochPlan,
    loader: TrainLoader,
    learner: Learner,
    settings: Settings,
    world: World,
    steps: int,
    warm: int,
) -> Pace:
    """`steps` steps of each kind, after `warm` that are not counted; fewer if the epoch is shorter."""
    steps = max(1, min(steps, plan.steps - warm))
    warm = min(warm, plan.steps - steps)
    learner.model.train()

    def step(images: Tensor, labels: Tensor) -> None:
        train_step(learner, images, labels, settings.training.label_smoothing)

    def rate(work: Callable[[Tensor, Tensor], None], where: World) -> float:
        return _over_epoch(loader, plan, where, steps, warm, work)

    with closing(loader.epoch(plan)) as batches:
        images, labels = (part.clone() for part in next(batches))
    started = 0.0
    for number in range(warm + steps):
        if number == warm:
            started = _now(world)
        step(images, labels)
    model = steps * len(images) / (_now(world) - started)
    with FlopCounterMode(display=False) as counter:
        train_step(learner, images, labels, 0.0, plain=True)
    nothing = rate(lambda images, labels: None, world)
    return Pace(
        resolution=side,
        loader=nothing,
        host=nothing if world.device.type == "cpu" else _on_host(loader, plan, steps, warm),
        model=model,
        both=rate(step, world),
        flops=counter.get_total_flops() / len(images),
    )


def train_step(
    learner: Learner, images: Tensor, labels: Tensor, smoothing: float, plain: bool = False
) -> None:
    """The step of `train_epoch` without its bookkeeping, at the optimizer's present rate.

    `plain` runs the uncompiled network, whose operations can be counted.
    """
    forward = learner.model if plain else learner.forward
    with torch.autocast(images.device.type, learner.dtype, enabled=learner.dtype != torch.float32):
        loss = F.cross_entropy(
            forward(images), labels, ignore_index=PADDING, label_smoothing=smoothing
        )
    learner.scaler.scale(loss).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)


def _over_epoch(
    loader: TrainLoader,
    plan: EpochPlan,
    world: World,
    steps: int,
    warm: int,
    work: Callable[[Tensor, Tensor], None],
) -> float:
    """Images/s of `work` over batches of an epoch."""
    started, images_done = _now(world), 0
    with closing(loader.epoch(plan)) as batches:
        for number, (images, labels) in enumerate(batches):
            work(images, labels)
            if number + 1 == warm:
                started, images_done = _now(world), 0
            elif number >= warm:
                images_done += len(images)
            if number + 1 == warm + steps:
                break
        seconds = _now(world) - started
    return images_done / seconds


def _on_host(loader: TrainLoader, plan: EpochPlan, steps: int, warm: int) -> float:
    """The loader alone, its batches left where they were decoded."""
    on_host = World(0, 1, 0, 1, torch.device("cpu"))
    device, loader.world = loader.world, on_host
    try:
        return _over_epoch(loader, plan, on_host, steps, warm, lambda images, labels: None)
    finally:
        loader.world = device


def _now(world: World) -> float:
    """The clock, when the device has done all it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()

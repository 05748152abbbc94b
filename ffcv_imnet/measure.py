"""How fast this machine loads, steps, and does both at once: seconds of measuring instead of a run."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from ffcv_imnet.checkpoint import Learner
from ffcv_imnet.data import TrainLoader, ValLoader
from ffcv_imnet.distributed import StopSignal, World
from ffcv_imnet.evaluation import evaluate
from ffcv_imnet.schedules import EpochPlan
from ffcv_imnet.settings import Settings
from ffcv_imnet.training import train_epoch

Batch = tuple[Tensor, Tensor]
# Of the seconds given, what the loader alone, the step alone and both together get: the prediction
# rests on the last.
SHARES = (1 / 6, 1 / 3, 1 / 2)
PILOT_STEPS = 3  # what tells how long a step takes; the first one compiles


@dataclass(frozen=True)
class Rates:
    """Training at one resolution; images a second of all processes together."""

    resolution: int  # side of the training crops, px
    loader: float  # decoded and copied to the device, nothing else running
    step: float  # forward, backward and update on a batch that stays on the device
    both: float  # as training does it
    first_batch: float  # seconds from an epoch's start to its first batch
    warm_up: float  # seconds that the first steps took more than later ones: compilation, tuning


class _Timed:
    """A loader that notes when it was asked for each batch."""

    def __init__(self, source: Callable[[], Iterator[Batch]]) -> None:
        self.source = source
        self.asked: list[float] = []
        self.first_batch = 0.0

    def batches(self) -> Iterator[Batch]:
        with closing(self.source()) as source:  # type: ignore[type-var]  # generators, all of them
            while True:
                self.asked.append(time.perf_counter())
                batch = next(source, None)
                if batch is None:
                    self.asked.pop()
                    return
                if len(self.asked) == 1:
                    self.first_batch = time.perf_counter() - self.asked[0]
                yield batch

    def epoch(self, plan: EpochPlan) -> Iterator[Batch]:
        return self.batches()

    def seconds_a_batch(self, end: float) -> float:
        """Mean, without the first one, which starts threads, where there is another."""
        points = [*self.asked, end]
        spans = [b - a for a, b in pairwise(points)]
        later = spans[1:] or spans
        return sum(later) / len(later)


def measure(
    learner: Learner,
    loader: TrainLoader,
    plan: EpochPlan,
    settings: Settings,
    world: World,
    seconds: float = 30.0,
) -> Rates:
    """Measure the loader alone, the step alone and both, at `plan`'s resolution and batch.

    Takes about `seconds` after the warm-up, longer where three steps take longer. The step is that of
    `train_epoch` with a learning rate next to zero; the learner's weights are not fit for use
    afterwards. All processes of `world` must call it together.

    Raises:
        RunError: the loader failed.
    """
    still = replace(settings, lr=replace(settings.lr, lr=1e-12))
    stop = StopSignal.__new__(StopSignal)  # no handlers: Ctrl-C ends a measurement as usual
    stop.received = None

    def steps(source: Callable[[], Iterator[Batch]], count: int) -> tuple[_Timed, float]:
        timed = _Timed(source)
        short = replace(plan, steps=count, epoch=plan.epoch)
        train_epoch(learner, cast(TrainLoader, timed), short, still, world, stop)
        return timed, timed.seconds_a_batch(time.perf_counter())

    def agree(share: float, a_batch: float) -> int:
        """Steps that fill a share of the time: the same number on every process."""
        wanted = torch.tensor(share * seconds / a_batch, dtype=torch.float64, device=world.device)
        return min(plan.steps, max(PILOT_STEPS, round(float(world.sum(wanted)) / world.size)))

    def real() -> Iterator[Batch]:
        return loader.epoch(plan)

    started = time.perf_counter()
    _, a_batch = steps(real, min(PILOT_STEPS, plan.steps))
    pilot = time.perf_counter() - started

    alone = _Timed(real)
    until = time.perf_counter() + SHARES[0] * seconds
    with closing(alone.batches()) as batches:  # type: ignore[type-var]
        for images, labels in batches:
            batch = images, labels
            if time.perf_counter() > until:
                break
    loading = alone.seconds_a_batch(time.perf_counter())
    kept = batch[0].clone(memory_format=torch.preserve_format), batch[1].clone()

    def same() -> Iterator[Batch]:
        while True:
            yield kept

    _, a_step = steps(same, agree(SHARES[1], a_batch))
    together, a_batch = steps(real, agree(SHARES[2], a_batch))
    return Rates(
        resolution=plan.resolution,
        loader=plan.batch_size / loading,
        step=plan.batch_size / a_step,
        both=plan.batch_size / a_batch,
        first_batch=together.first_batch,
        warm_up=max(0.0, pilot - together.first_batch - PILOT_STEPS * a_batch),
    )

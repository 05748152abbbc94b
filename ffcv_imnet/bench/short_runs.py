"""Short runs: on a part of the training images, at the lowest resolution, scored on another part of them.

`tune` compares settings by them. Each is a whole schedule, from warm-up to zero, so that a high learning
rate is not judged before it has been lowered.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from ffcv_imnet.bench import cost
from ffcv_imnet.config.schedules import EpochPlan, plan_run, stages
from ffcv_imnet.config.schema import Plan, Resolution, Settings
from ffcv_imnet.core.errors import NonFiniteLoss, NonFiniteValidation, UsageError
from ffcv_imnet.data.loader import Batches, Indices, TrainLoader, ValLoader, epoch_order
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train.checkpoint import Trained
from ffcv_imnet.train.epoch import build_learner, train_epoch
from ffcv_imnet.train.start import Start
from ffcv_imnet.train.validate import evaluate
from ffcv_imnet.train.watch import Watch

REDUCTION = 3  # of `RUNGS` rungs each has so many times the images of the one before
RUNGS = 3
MOST_EPOCHS = 2  # over all images, on the last rung
FEWEST_STEPS = 16  # on the first: fewer say nothing of a learning rate
HELD_OUT = 10_000  # images to score on: the standard error of a top-1 of 10 % is then 0.3 points
PRICED_ON = "a2-highgpu-1g"  # the row of machines.yaml that a budget in A100-minutes speaks of


@dataclass(frozen=True)
class Rung:
    """How long the runs of one rung are."""

    subset: int  # training images
    epochs: int

    @property
    def images(self) -> int:
        """Seen in one run."""
        return self.subset * self.epochs


@dataclass(frozen=True)
class Score:
    """A short run's network on the images held out; `loss` is infinite where training diverged."""

    loss: float
    top_1: float
    seconds: float


def held_out(samples: int) -> int:
    """How many of the training images are kept from training."""
    return min(HELD_OUT, samples // 10)


def short(settings: Settings, rung: Rung) -> Settings:
    """The recipe as a run of `rung`: its first stage of the lowest resolution, its schedule's shape."""
    row = min(stages(settings), key=lambda stage: stage.resolution)
    highest = max(stage.resolution for stage in stages(settings))
    share = rung.epochs / settings.training.epochs
    side = max(16, round(settings.validation.resolution * row.resolution / highest / 16) * 16)
    return replace(
        settings,
        resolution=Resolution(),
        plan=Plan(stages=(replace(row, epochs=rung.epochs),)),
        lr=replace(settings.lr, lr_peak_epoch=settings.lr.lr_peak_epoch * share),
        model=replace(
            settings.model,
            freeze_epochs=min(rung.epochs - 1, round(settings.model.freeze_epochs * share)),
        ),
        training=replace(
            settings.training,
            epochs=rung.epochs,
            # Compiling takes longer than such a run, averaged weights more steps than it has.
            compile=False,
            ema_decay=0.0,
            checkpoint_minutes=0.0,
        ),
        validation=replace(settings.validation, resolution=side, lr_tta=False),
    )


def runs_of_rungs(trials: int) -> list[float]:
    """How many runs of each rung successive halving is expected to make, if scores come in random order.

    The k-th of them goes on if it is among the best k/3 so far, or the best of all.
    """
    counts = [float(trials)]
    for _ in range(RUNGS - 1):
        counts.append(sum(max(1, k // REDUCTION) / k for k in range(1, round(counts[-1]) + 1)))
    return counts


def plan_rungs(images: float, trials: int, again: int, samples: int, batch: int) -> list[Rung]:
    """The rungs of a search that sees about `images` images, but at most twice the data set in a run.

    Args:
        again: runs of the last rung that follow the search.
        samples: in the training file, those that are held out among them.

    Raises:
        UsageError: that leaves fewer than 16 steps for a run.
    """
    available = samples - held_out(samples)
    counts = runs_of_rungs(trials)
    counts[-1] += again
    weight = sum(count * REDUCTION**number for number, count in enumerate(counts))
    most = MOST_EPOCHS * available / REDUCTION ** (RUNGS - 1)
    first = int(min(images / weight, most))
    if first < FEWEST_STEPS * batch:
        way = "a larger --minutes, or fewer --trials" if first < int(most) else "more images"
        fits = first // FEWEST_STEPS
        smaller = f"a batch of {fits} or less, or " if fits else ""
        raise UsageError(
            f"the shortest runs would have {first:,} images, {first // batch} steps of training.batch_size {batch}, "
            f"and {FEWEST_STEPS} are needed: give {smaller}{way}"
        )
    rungs = []
    for number in range(RUNGS):
        seen = first * REDUCTION**number
        epochs = math.ceil(seen / available)
        rungs.append(Rung(subset=seen // epochs, epochs=epochs))
    return rungs


def estimate(
    settings: Settings, rungs: Sequence[Rung], runs: Sequence[float], samples: int, classes: int
) -> list[cost.Line]:
    """So many runs of each rung on every machine of the cost estimate's table, one GPU's work after another."""
    plans: list[EpochPlan] = []
    for rung, count in zip(rungs, runs, strict=True):
        one = plan_run(short(settings, rung), rung.subset)
        plans += [replace(plan, steps=round(plan.steps * count)) for plan in one]
    scored = round(sum(runs) * held_out(samples) / len(plans))
    return cost.estimate(short(settings, rungs[0]), tuple(plans), scored, classes)


def a100_images(settings: Settings, minutes: float, samples: int, classes: int) -> float:
    """Images that one A100 trains on in so many minutes, by the cost estimate.

    Raises:
        UsageError: its tables lack the A100.
    """
    rung = Rung(subset=samples, epochs=1)
    lines = estimate(settings, [rung], [1.0], samples, classes)
    line = next((line for line in lines if line.machine.name == PRICED_ON), None)
    if line is None:
        raise UsageError(f"{cost.MACHINES} has no {PRICED_ON}, which --minutes is counted on")
    return minutes * 60 * line.stages[0].images / line.stages[0].seconds


class _Part:
    """A training loader's batches of some of its samples, in an order of their own each epoch."""

    def __init__(self, loader: TrainLoader, samples: Indices) -> None:
        self.loader, self.samples = loader, samples

    @property
    def waited(self) -> float:
        return self.loader.waited

    def epoch(self, plan: EpochPlan, first_step: int = 0) -> Batches:
        order = epoch_order(len(self.samples), self.loader.seed, plan.epoch)
        begin, end = first_step * plan.batch_size, plan.steps * plan.batch_size
        return self.loader.epoch(plan, only=self.samples[order[begin:end]])


class ShortRuns:
    """The data set in two parts, and runs on them.

    Args:
        samples: in `data.train_dataset`, which is there and checked.
        classes: how many.
        start: what each run starts from, where that is not random.
    """

    def __init__(self, samples: int, classes: int, start: Start | None, world: World) -> None:
        self.samples, self.classes, self.start, self.world = samples, classes, start, world
        # One order for all runs: a larger subset holds the smaller ones.
        order = np.random.default_rng(0).permutation(samples)
        held = held_out(samples)
        self.held, self.rest = np.sort(order[:held]), order[held:]

    def run(self, settings: Settings, rung: Rung) -> Score:
        """Train and score `short(settings, rung)`. Its seed is that of weights, order and augmentation.

        Raises:
            RunError: the loader failed.
        """
        began = time.perf_counter()
        settings, path = short(settings, rung), settings.data.train_dataset
        learner = build_learner(settings, self.classes, self.world)
        if self.start is not None:
            self.start.put_into(learner.model)
        loader = TrainLoader(path, self.samples, settings, self.world)
        part = _Part(loader, self.rest[: rung.subset])
        watch = Watch(self.world, listen=False)  # Ctrl-C ends a search as it ends any command
        try:
            for plan in plan_run(settings, rung.subset):
                train_epoch(
                    learner, cast(TrainLoader, part), plan, settings.schedule, Trained(), watch
                )
            scored = ValLoader(path, self.held, settings, self.world)
            found = evaluate(learner.eval_forward, scored, self.world, learner.dtype)
        except (NonFiniteLoss, NonFiniteValidation):
            return Score(math.inf, 0.0, time.perf_counter() - began)
        return Score(found.loss, found.top_1, time.perf_counter() - began)

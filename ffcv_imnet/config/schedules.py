"""Learning rate, resolution and crop scale as pure functions of the epoch, and the whole run's plan."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ffcv_imnet.config.domains import Stage
from ffcv_imnet.config.schema import Lr, Settings
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.names import number_of

IMAGENET_TRAIN_IMAGES = 1_281_167  # ILSVRC 2012
FEW_STEPS = 10  # an epoch of fewer is remarked on


@dataclass(frozen=True)
class EpochPlan:
    """Everything that one epoch does differently from another."""

    epoch: int  # counted from 0
    resolution: int  # side of the training crops, px
    batch_size: int  # global
    steps: int
    crop_scale: tuple[float, float]
    label_smoothing: float
    lr_start: float  # at the first and at the last step
    lr_end: float
    epochs: int  # of the whole run
    head_alone: bool = False  # the body rests

    @property
    def images(self) -> int:
        """Training images used; what does not fill a batch is left out."""
        return self.steps * self.batch_size


def learning_rate(lr: Lr, epochs: int, epoch: float, batch_size: int) -> float:
    """At the point `epoch` of a run of `epochs`: 2.5 is the middle of the third.

    Scaled linearly with `batch_size` where `lr.base_batch_size` says so. The loop asks for the
    middle of a step, so that neither the first nor the last has rate zero.
    """
    peak = lr.lr * (batch_size / lr.base_batch_size if lr.base_batch_size else 1.0)
    if epoch < lr.lr_peak_epoch:
        return peak * epoch / lr.lr_peak_epoch
    if epoch == lr.lr_peak_epoch:  # which may be the run's end
        return peak
    done = (epoch - lr.lr_peak_epoch) / (epochs - lr.lr_peak_epoch)
    if lr.decay == "steps":
        return peak * 0.1 ** math.floor(3 * done)
    return peak * (1.0 - done if lr.decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * done))


def resolution(settings: Settings, epoch: int) -> int:
    """Side of the training crops in `epoch`, px.

    Linear between the ends of the ramp, rounded to a multiple of 32 (halves to the even one), as
    in ffcv-imagenet; the ends themselves are taken as given.
    """
    r = settings.resolution
    if epoch <= r.start_ramp and epoch < r.end_ramp:
        return r.min_res
    if epoch >= r.end_ramp or r.min_res == r.max_res:
        return r.max_res
    done = (epoch - r.start_ramp) / (r.end_ramp - r.start_ramp)
    between = round((r.min_res + (r.max_res - r.min_res) * done) / 32) * 32
    return min(max(between, r.min_res), r.max_res)


def stages(settings: Settings) -> list[Stage]:
    """One row an epoch: from `plan.stages`, or else from the ramp."""
    return [row for row in settings.plan.stages for _ in range(row.epochs)] or [
        Stage(epochs=1, resolution=resolution(settings, epoch))
        for epoch in range(settings.training.epochs)
    ]


def resolutions(settings: Settings) -> tuple[int, ...]:
    """Every side of training crops in the run, px, ascending."""
    return tuple(sorted({row.resolution for row in stages(settings)}))


def batch_sizes(settings: Settings) -> tuple[int, ...]:
    """Every global batch size of the run, ascending."""
    return tuple(
        sorted({row.batch_size or settings.training.batch_size for row in stages(settings)})
    )


def plan_run(settings: Settings, train_images: int) -> tuple[EpochPlan, ...]:
    """The whole run before it starts.

    Raises:
        UsageError: a batch is larger than the training set.
    """
    training, plans = settings.training, []
    for epoch, row in enumerate(stages(settings)):
        batch = row.batch_size or training.batch_size
        scale, smoothing = row.crop_scale, row.label_smoothing
        steps = train_images // batch
        if steps == 0:
            raise UsageError(
                f"{'training.batch_size' if row.batch_size is None else 'a row of plan.stages: batch_size'} "
                f"{batch} is larger than the {train_images} training images: "
                f"no step would be made; {max(1, train_images // 10)} would make ten or more an epoch"
            )
        plans.append(
            EpochPlan(
                epoch=epoch,
                resolution=row.resolution,
                batch_size=batch,
                steps=steps,
                crop_scale=settings.augmentation.crop_scale if scale is None else scale,
                label_smoothing=training.label_smoothing if smoothing is None else smoothing,
                lr_start=learning_rate(
                    settings.schedule, training.epochs, epoch + 0.5 / steps, batch
                ),
                epochs=training.epochs,
                head_alone=epoch < settings.model.freeze_epochs,
                lr_end=learning_rate(
                    settings.schedule, training.epochs, epoch + 1 - 0.5 / steps, batch
                ),
            )
        )
    return tuple(plans)


def say_few_steps(plans: Sequence[EpochPlan], images: int, say: bool = True) -> None:
    """Say on stderr that an epoch has few steps, where a smaller batch is likely to be better."""
    fewest = min(plans, key=lambda plan: plan.steps)
    if say and fewest.steps < FEW_STEPS and fewest.batch_size > 1:
        print(
            f"of {number_of(images, 'training image')} an epoch makes {number_of(fewest.steps, 'step')} with "
            f"batches of {fewest.batch_size:,}: a smaller batch makes more",
            file=sys.stderr,
            flush=True,
        )

"""Learning rate, resolution and crop scale as pure functions of the epoch, and the whole run's plan."""

from dataclasses import dataclass

from ffcv_imnet.errors import UsageError
from ffcv_imnet.settings import Settings

IMAGENET_TRAIN_IMAGES = 1_281_167  # ILSVRC 2012


@dataclass(frozen=True)
class EpochPlan:
    """Everything that one epoch does differently from another."""

    epoch: int  # counted from 0
    resolution: int  # side of the training crops, px
    batch_size: int  # global
    steps: int
    crop_scale: tuple[float, float]
    lr_start: float  # at the first and at the last step
    lr_end: float

    @property
    def images(self) -> int:
        """Training images used; what does not fill a batch is left out."""
        return self.steps * self.batch_size


def interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """Piecewise linear, constant outside; where two `xs` coincide the later one wins."""
    if x < xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x0 <= x < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]


def peak_lr(settings: Settings) -> float:
    """`lr.lr`, scaled linearly with the batch where `lr.base_batch_size` says so."""
    base = settings.lr.base_batch_size
    return settings.lr.lr * (settings.training.batch_size / base if base else 1.0)


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """At global `step`, counted from 0.

    Read off at the middle of the step, so that neither the first nor the last has rate zero.
    """
    epoch = (step + 0.5) / steps_per_epoch
    peak, last = settings.lr.lr_peak_epoch, float(settings.training.epochs)
    return interpolate(epoch, [0.0, peak, last], [0.0, peak_lr(settings), 0.0])


def resolution(settings: Settings, epoch: int) -> int:
    """Side of the training crops in `epoch`, px.

    Linear between the ends of the ramp, rounded to a multiple of 32 (halves to the even one), as
    in ffcv-imagenet; the ends themselves are taken as given.
    """
    r = settings.resolution
    if epoch <= r.start_ramp and epoch < r.end_ramp:
        return r.min_res
    if epoch >= r.end_ramp:
        return r.max_res
    ramp = [float(r.start_ramp), float(r.end_ramp)]
    return round(interpolate(epoch, ramp, [r.min_res, r.max_res]) / 32) * 32


def plan_run(settings: Settings, train_images: int) -> tuple[EpochPlan, ...]:
    """The whole run before it starts.

    Raises:
        UsageError: the batch is larger than the training set.
    """
    batch = settings.training.batch_size
    steps = train_images // batch
    if steps == 0:
        raise UsageError(
            f"training.batch_size {batch} is larger than the {train_images} training images: "
            f"no step would be made; set it to {train_images} or less"
        )
    return tuple(
        EpochPlan(
            epoch=epoch,
            resolution=resolution(settings, epoch),
            batch_size=batch,
            steps=steps,
            crop_scale=settings.augmentation.crop_scale,
            lr_start=learning_rate(settings, epoch * steps, steps),
            lr_end=learning_rate(settings, (epoch + 1) * steps - 1, steps),
        )
        for epoch in range(settings.training.epochs)
    )

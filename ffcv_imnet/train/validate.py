"""One exact pass over the validation set: every image counts once, at any number of processes."""

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffcv_imnet.core.errors import NonFiniteValidation, RunError
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.loader import PADDING, Batches, ValLoader
from ffcv_imnet.machine.distributed import Interrupted, StopSignal, World
from ffcv_imnet.train.checkpoint import Learner
from ffcv_imnet.train.heartbeat import SILENT, Heartbeat
from ffcv_imnet.train.watch import Watch


@dataclass(frozen=True)
class Metrics:
    """Fractions of one over all images; `loss` is the mean plain cross-entropy of the single view."""

    loss: float
    top_1: float
    top_5: float
    tta_top_1: float | None  # with logits summed over the image and its mirror image
    tta_top_5: float | None
    images: int


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the first, and among the first five, of the logits.

    Args:
        logits: (N, classes). With fewer than five classes all of them count as the first five.
        labels: (N,), int64; a negative one is never hit.

    Returns:
        (2,), float64, on the same device.
    """
    best = logits.topk(min(5, logits.shape[1])).indices
    found = best == labels[:, None]
    return torch.stack([found[:, 0].sum(), found.sum()]).double()


class Loader(Protocol):
    """`data.ValLoader` or `FolderLoader`: sample k * size + rank is this process's k-th."""

    samples: int

    def batches(self) -> Batches: ...


@torch.no_grad()
def forward(
    model: nn.Module,
    loader: Loader,
    world: World,
    dtype: torch.dtype,
    *,
    tta: bool,
    what: str,
    stop: StopSignal | None = None,
    heart: Heartbeat = SILENT,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Logits of every batch and its labels, in evaluation mode.

    Yields:
        Logits (batch, classes), float32, of the view "single" and with `tta` of "flip", where they
        are the mean over the image and its mirror image; labels (batch,), `PADDING` among them.

    Raises:
        Interrupted: `stop` noted a signal, on any of the processes.
        RunError: the loader failed.
    """
    model.eval()
    done = 0
    with Progress(loader.samples, what, enabled=world.is_main) as progress:
        for images, labels in loader.batches():
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                logits = {"single": model(images).float()}
                if tta:
                    logits["flip"] = (logits["single"] + model(images.flip(3)).float()) / 2
            yield logits, labels
            progress.update(len(labels) * world.size)
            heart.beat("validating")
            done += len(labels)
            # Voted on after each batch that every process has: shares differ by an image, and so may
            # their numbers of batches. torchrun kills 30 s after it asked to end.
            if stop is not None and done <= loader.samples // world.size:
                (stopped,) = world.any([stop.received is not None])
                if stopped:
                    raise Interrupted(stop.received or signal.SIGTERM)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    world: World,
    dtype: torch.dtype,
    *,
    tta: bool = False,
    stop: StopSignal | None = None,
    heart: Heartbeat = SILENT,
    what: str = "validation",
) -> Metrics:
    """Evaluate `model` on all of `loader`'s images, in evaluation mode.

    Sums are kept on the device in float64, added up over the processes once, at the end.

    Raises:
        Interrupted: see `forward`.
        NonFiniteValidation: the loss is NaN or infinite.
        RunError: the loader failed.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=world.device)
    batches = forward(model, loader, world, dtype, tta=tta, what=what, stop=stop, heart=heart)
    for logits, labels in batches:
        single = logits["single"]
        sums[0] += F.cross_entropy(single, labels, ignore_index=PADDING, reduction="sum")
        sums[1] += (labels != PADDING).sum()
        sums[2:4] += hits(single, labels)
        if tta:
            sums[4:6] += hits(logits["flip"], labels)
    loss_sum, images_seen, *found = world.sum(sums).tolist()
    if not images_seen:
        raise RunError(f"not one image of the {what} could be decoded: write its .beton again")
    if not math.isfinite(loss_sum):
        raise NonFiniteValidation(what)
    top_1, top_5, tta_top_1, tta_top_5 = (count / images_seen for count in found)
    return Metrics(
        loss=loss_sum / images_seen,
        top_1=top_1,
        top_5=top_5,
        tta_top_1=tta_top_1 if tta else None,
        tta_top_5=tta_top_5 if tta else None,
        images=round(images_seen),
    )


@dataclass(frozen=True)
class Validation:
    """What an epoch's weights are worth, and their average where one is kept."""

    plain: Metrics
    ema: Metrics | None
    seconds: float
    skipped: int  # damaged images


def validate(learner: Learner, loader: ValLoader, watch: Watch, tta: bool) -> Validation:
    """Evaluate the weights and, where there is one already, their average.

    BatchNorm's statistics are first made equal on all processes, and stay so for the checkpoint.
    """
    started = time.perf_counter()
    world, stop, heart = watch.world, watch.stop, watch.heart
    heart.beat("validating")
    world.share(learner.model)
    plain = evaluate(
        learner.eval_forward, loader, world, learner.dtype, tta=tta, stop=stop, heart=heart
    )
    skipped = loader.samples - plain.images
    if learner.ema is None or learner.ema_eval_forward is None or not learner.ema.n_averaged:
        return Validation(plain, None, time.perf_counter() - started, skipped)
    world.share(learner.ema)
    average = evaluate(
        learner.ema_eval_forward,
        loader,
        world,
        learner.dtype,
        tta=tta,
        stop=stop,
        heart=heart,
        what="EMA validation",
    )
    return Validation(plain, average, time.perf_counter() - started, skipped)

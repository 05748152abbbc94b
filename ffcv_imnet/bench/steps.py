"""Training steps to measure against each other, on a batch that stays on the device: ours, and ffcv-imagenet's.

`tools/benchmark.py` drives them. All train a network of torchvision's with BlurPool on 1,000 classes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn

from ffcv_imnet.config.domains import MOST_EPOCHS
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import EpochPlan
from ffcv_imnet.core.errors import RunError
from ffcv_imnet.data.loader import Batches, TrainLoader
from ffcv_imnet.machine.device import DTYPES, synchronise
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.models import Normalize
from ffcv_imnet.models.blurpool import BlurConv2d, apply_blurpool
from ffcv_imnet.train.checkpoint import Trained
from ffcv_imnet.train.epoch import build_learner, train_epoch
from ffcv_imnet.train.optim import parameter_groups
from ffcv_imnet.train.watch import Watch

CLASSES = 1000
ARCHS = ("resnet18", "resnet50")
STEPS: dict[str, dict[str, Any]] = {  # ours: the settings that make it
    "sgd": {},
    "sgd compiled": {"training__compile": True},
    "muon": {"training__optimizer": "muon", "muon__ns_steps": 3},
    "soap": {"training__optimizer": "soap"},
    "muon compiled": {
        "training__optimizer": "muon",
        "muon__ns_steps": 3,
        "training__compile": True,
    },
}
LR, MOMENTUM, WEIGHT_DECAY, SMOOTHING = 1e-3, 0.9, 5e-5, 0.1


@dataclass(frozen=True)
class Stepper:
    """A network and how it makes its steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: Callable[[Tensor, Tensor, int], None]  # images, labels, number of steps

    def seconds(self, images: Tensor, labels: Tensor, steps: int) -> float:
        """Of `steps` steps, until the device has made them.

        Raises:
            RunError: the batch does not fit in the device's memory.
        """
        with room_for(images):
            synchronise(images.device)
            started = time.perf_counter()
            self.run(images, labels, steps)
            synchronise(images.device)
            return time.perf_counter() - started

    @property
    def period(self) -> int:
        """Steps until all kinds of steps have been made: SOAP turns its bases in one of `every`."""
        return int(getattr(self.optimizer, "every", 1))

    def update_seconds(self, images: Tensor, steps: int) -> float:
        """Of one update alone, forward and backward left out: the mean of `steps`."""
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        with room_for(images):
            self.optimizer.step()
            synchronise(images.device)
            started = time.perf_counter()
            for _ in range(steps):
                self.optimizer.step()
            synchronise(images.device)
            taken = time.perf_counter() - started
        self.optimizer.zero_grad(set_to_none=True)
        return taken / steps


def ours(arch: str, step: str, precision: str, batch_size: int, world: World) -> Stepper:
    """The step of `train_epoch`, by that very function; `step` is a name in `STEPS`."""
    settings = load(
        model__arch=arch,
        training__batch_size=batch_size,
        training__precision=precision,
        training__momentum=MOMENTUM,
        training__weight_decay=WEIGHT_DECAY,
        lr__lr=LR,
        lr__lr_peak_epoch=0,
        **STEPS[step],
    )
    learner = build_learner(settings, CLASSES, world)
    silent = replace(world, rank=1)  # only the first process shows progress

    def run(images: Tensor, labels: Tensor, steps: int) -> None:
        loader = cast(TrainLoader, _Still(images, labels))
        plan = EpochPlan(
            epoch=0,
            resolution=images.shape[-1],
            batch_size=len(images),
            steps=steps,
            crop_scale=(1.0, 1.0),
            label_smoothing=settings.training.label_smoothing,
            lr_start=LR,
            lr_end=LR,
            epochs=MOST_EPOCHS,  # of which one is made: a constant learning rate
        )
        train_epoch(
            learner, loader, plan, settings.schedule, Trained(), Watch(silent, listen=False)
        )

    return Stepper(learner.model, learner.optimizer, run)


def public(arch: str, precision: str, device: torch.device) -> Stepper:
    """ffcv-imagenet's step (github.com/libffcv/ffcv-imagenet, train_imagenet.py): torchvision's network
    with BlurPool, channels_last, autocast with a GradScaler, torch's own SGD, nothing compiled. Its loader
    hands out normalised pixels, so here they are normalised once a call and not at every step."""
    torch.backends.cudnn.benchmark = True
    model = torchvision.models.get_model(arch, num_classes=CLASSES)
    apply_blurpool(model, PublicBlur)
    model = model.to(device).to(memory_format=torch.channels_last)
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = DTYPES[precision]

    def run(images: Tensor, labels: Tensor, steps: int) -> None:
        losses = []
        model.train()
        normalised = Normalize().to(device)(images).to(dtype)
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LR
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = criterion(model(normalised), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())

    return Stepper(model, optimizer, run)


class _Still:
    """A loader whose every batch is the same."""

    waited = 0.0

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.batch = images, labels

    def epoch(self, plan: EpochPlan, first_step: int = 0) -> Batches:
        while True:
            yield self.batch


class PublicBlur(BlurConv2d):
    """As ffcv-imagenet has it: the blur has stride 1, whatever the kernel's size."""

    def __init__(self, conv: nn.Conv2d) -> None:
        stride = conv.stride
        super().__init__(conv)
        self.stride, conv.stride = (1, 1), stride


def batch_of(batch_size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise as a loader hands it out: (batch_size, 3, side, side), channels_last, and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 3, side, side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (batch_size,), generator=generator)
    images = images.to(memory_format=torch.channels_last)
    return images.to(device), labels.to(device)


@contextmanager
def room_for(images: Tensor) -> Iterator[None]:
    """Raises RunError where torch says that memory is short."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{len(images)} images of {images.shape[-1]} px do not fit in the device's memory: "
            f"take a smaller --batch_size"
        ) from error

"""What happens to a batch on the device, after the loader's crops and flips: RandAugment, MixUp, CutMix.

All three are torchvision's (transforms.v2), which draws from torch's generator on the CPU. MixUp and CutMix wait for
nothing; RandAugment's rotations, shears and shifts copy a matrix to the device, for which the host waits. The generator is set for each use from (seed, epoch, place in the epoch) and put back: a resumed run
does what an uninterrupted one does. Images stay uint8, so each resolution keeps its one compiled graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ffcv_imnet.config.schema import Settings
from ffcv_imnet.machine.distributed import World

# Images that share RandAugment's two draws. v2.RandAugment treats a tensor alike: one at a time would be a thousand
# times some ten launches a step. The order of the images is random, so each still gets any two with equal chance.
ALIKE = 16
OPERATIONS = 2  # as the paper's N for ImageNet (arXiv:1909.13719, table 4)
MIX, ALTER, NETWORK = 0, 1, 2  # streams


@dataclass(frozen=True)
class Augment:
    """Of the batches of one process. `mixes` is empty without MixUp and CutMix, `alter` None without RandAugment."""

    seed: int
    classes: int
    rank: int
    mixes: tuple[nn.Module, ...]  # v2.MixUp, v2.CutMix
    alter: nn.Module | None  # v2.RandAugment

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """One batch of this process.

        Args:
            images: (batch, 3, side, side), uint8, channels last.
            labels: (batch,), int64; negative where an image does not count.

        Returns:
            New images, alike in shape, type and memory; labels as they are, or where images were mixed each
            class's part, (batch, classes), float32, zero for what does not count. The batch itself where there
            is nothing to do.
        """
        if self.alter is None and not self.mixes:
            return images, labels
        if self.alter is not None:
            first = self.rank * len(images)
            altered = []
            for number, group in enumerate(images.split(ALIKE)):
                with drawing(self.seed, ALTER, epoch, step, first + number * ALIKE):
                    altered.append(self.alter(group))
            images = torch.cat(altered)
        if self.mixes:
            labels = one_hot(labels, self.classes)
            with drawing(self.seed, MIX, epoch, step, self.rank):
                mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
                mixed, labels = mix(images.float(), labels)
            images = mixed.round_().to(torch.uint8)
        return images.contiguous(memory_format=torch.channels_last), labels

    def seed_network(self, epoch: int, step: int) -> None:
        """Set torch's generators, the devices' too, for what the network draws in this step: dropout, stochastic
        depth. On each process something else, and by a resumed run the same."""
        torch.manual_seed(_number(self.seed, NETWORK, epoch, step, self.rank))


def build_augment(settings: Settings, classes: int, world: World) -> Augment:
    """What `augmentation` asks for beyond the loader's crops and flips."""
    wanted = settings.augmentation
    if not (wanted.mixup or wanted.cutmix or wanted.randaugment):
        return Augment(settings.training.seed, classes, world.rank, (), None)
    from torchvision.transforms import v2  # see models/resnet.py

    mixes: list[nn.Module] = []
    if wanted.mixup:
        mixes.append(v2.MixUp(alpha=wanted.mixup, num_classes=classes))
    if wanted.cutmix:
        mixes.append(v2.CutMix(alpha=wanted.cutmix, num_classes=classes))
    alter = None
    if wanted.randaugment:
        alter = v2.RandAugment(
            OPERATIONS, wanted.randaugment, interpolation=v2.InterpolationMode.BILINEAR
        )
    return Augment(settings.training.seed, classes, world.rank, tuple(mixes), alter)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(batch,) -> (batch, classes), float32; zeros for a label that is no class. Waits for no device."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """In here torch's generator on the CPU draws what belongs to `key`; afterwards it is as before."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(_number(*key))  # the accelerator's stays
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _number(*key: int) -> int:
    """A seed for `key`, below 2 to the 63."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(seed) >> 1

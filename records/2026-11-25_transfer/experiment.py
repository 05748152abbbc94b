"""One run of the study: its settings, its network, its images, its training.

Everything is seeded; one thread; float32 (faster here than bfloat16 on networks this narrow).
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import steppers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ffcv_imnet.config.schedules import learning_rate
from ffcv_imnet.config.schema import Lr
from ffcv_imnet.models import MEAN, STD
from ffcv_imnet.models.blurpool import apply_blurpool


@dataclass(frozen=True)
class Run:
    """What a run depends on. A field added later keeps the old runs' meaning as its default."""

    data: str = "tiny100"  # a folder of pack.py
    images: int = 50_000  # the first so many of the training set
    px: int = 40  # of training crops and of validation
    crop: float = 0.5  # smallest share of an image's area
    net: str = "rn18"  # or rn50
    width: float = 0.25  # of the published channels
    epochs: int = 4
    batch: int = 256
    optimizer: str = "muon"
    lr: float = 0.03  # peak; for sgd at batch 256, and in proportion to the batch
    sgd_lr: float = 1.0  # muon's other part: head, BatchNorm; at batch 256, and in proportion
    sgd_decay: float = 5e-5
    momentum: float = 0.95  # muon's
    decay: float = 0.0  # of what is not SGD's
    scale: str = "none"  # muon's rule for shape
    stem: str = "muon"  # who takes the first convolution
    hold: bool = False  # muon's kernels are kept at one norm
    ns_steps: int = 5
    seed: int = 0
    rest: str = "sgd"  # who takes what Muon does not: "sgd" at sgd_lr, "adamw" or "soap"
    rest_lr: float = 0.0  # adamw's or soap's
    rest_decay: float = 0.0  # adamw's or soap's, of the head
    second: float = 0.0  # muon: each output's second moment, averaged at this rate, divides its direction; 0: none
    taps: bool = False  # muon: a kernel is a matrix (outputs, inputs) a position, not one (outputs, inputs x 9)
    every: int = 10  # soap: steps from one turn of its bases to the next
    places: bool = True  # package's soap: a basis for the positions in a kernel too
    bias_mult: float = 1.0  # the learning rate of BatchNorm's shifts, in those of the rest

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.images // self.batch * self.epochs


class Narrow(ResNet):
    """torchvision's ResNet with fewer channels throughout, stem and bottlenecks included."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: list[int],
        classes: int,
        width: float,
    ) -> None:
        self.width = width
        super().__init__(block, layers, classes, zero_init_residual=True)
        self.fc = nn.Linear(round(512 * width) * block.expansion, classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:  # the first: the stem that it follows is there already
            self.inplanes = round(64 * self.width)
            self.conv1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        return super()._make_layer(block, round(planes * self.width), *args, **kwargs)


def network(run: Run, classes: int) -> nn.Module:
    """With BlurPool and zero-started BatchNorms, as in the recipes."""
    torch.manual_seed(run.seed)
    block, layers = {
        "rn18": (BasicBlock, [2, 2, 2, 2]),
        "rn50": (Bottleneck, [3, 4, 6, 3]),
    }[run.net]
    model = Narrow(block, layers, classes, run.width)
    apply_blurpool(model)
    return model.to(memory_format=torch.channels_last)


# ---- images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """One packed set."""

    pixels: Tensor  # uint8 (n, 3, side, side)
    labels: Tensor  # int64 (n,)


def load(folder: Path, part: str) -> Images:
    """Mapped, so that several workers share the pages."""
    pixels = np.load(folder / f"{part}_images.npy", mmap_mode="c")
    return Images(
        torch.from_numpy(pixels), torch.from_numpy(np.load(folder / f"{part}_labels.npy"))
    )


def resampling(start: Tensor, length: Tensor, side: int, px: int) -> Tensor:
    """(n, px, side): each output pixel's weights over a line of `side`, a triangle as PIL's bilinear.

    `start` and `length` (n,) are the crop's on that line, in input pixels.
    """
    ratio = (length / px)[:, None]
    centres = start[:, None] + (torch.arange(px) + 0.5) * ratio
    distance = (torch.arange(side) + 0.5 - centres[:, :, None]).abs()
    weights = (1 - distance / ratio.clamp(min=1)[:, :, None]).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)


def resample(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """uint8 (n, 3, side, side) -> normalised float32 (n, 3, px, px), channels last."""
    images = rows[:, None] @ pixels.float() @ columns.mT[:, None]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def crops(pixels: Tensor, run: Run, boxes: Tensor, flips: Tensor) -> Tensor:
    """Random resized crops: `boxes` (n, 4) uniform in [0, 1) for area, aspect ratio, top, left."""
    side = pixels.shape[-1]
    area = run.crop + (1 - run.crop) * boxes[:, 0]
    stretch = torch.exp((boxes[:, 1] - 0.5) * math.log(4 / 3))  # ratios from 3/4 to 4/3
    height = (area.sqrt() / stretch).clamp(max=1)
    width = (area.sqrt() * stretch).clamp(max=1)
    rows = resampling(boxes[:, 2] * (1 - height) * side, height * side, side, run.px)
    columns = resampling(boxes[:, 3] * (1 - width) * side, width * side, side, run.px)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    return resample(pixels, rows, columns)


# ---- training -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, px: int) -> dict[str, list[float]]:
    """Top-1 and mean loss of both halves: one to choose on, one to report on."""
    model.eval()
    side = images.pixels.shape[-1]
    line = resampling(torch.zeros(1), torch.full((1,), float(side)), side, px)
    logits = torch.cat(
        [model(resample(pixels, line, line)) for pixels in images.pixels.split(250)]
    ).float()
    model.train()
    right = (logits.argmax(1) == images.labels).double()
    losses = F.cross_entropy(logits, images.labels, reduction="none").double()
    middle = len(right) // 2
    return {
        "top_1": [right[:middle].mean().item(), right[middle:].mean().item()],
        "val_loss": [losses[:middle].mean().item(), losses[middle:].mean().item()],
    }


def schedule(run: Run) -> Callable[[float], float]:
    """The package's: warm-up over an eighth of the run, then linear to zero; its peak is one."""
    lr = Lr(lr=1.0, lr_peak_epoch=run.epochs / 8)
    if run.optimizer == "schedulefree":  # the warm-up alone
        return lambda epoch: min(1.0, epoch / lr.lr_peak_epoch)
    return lambda epoch: learning_rate(lr, run.epochs, epoch, run.batch)


def settle(model: nn.Module, images: Images, run: Run) -> None:
    """BatchNorm's statistics of the weights that schedule-free evaluates, from 4,096 crops."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    generator = torch.Generator().manual_seed(run.seed)
    with torch.no_grad():
        for pixels in images.pixels[:4096].split(256):
            boxes = torch.rand(len(pixels), 4, generator=generator)
            model(crops(pixels, run, boxes, boxes[:, 0] < 0.5))
    for norm in norms:
        norm.momentum = 0.1


def train(
    run: Run, train_set: Images, val_set: Images, alive: Callable[[], None]
) -> dict[str, Any]:
    """The whole run; `alive` is called after each epoch and may raise."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    wall, cpu = time.time(), time.process_time()
    model = network(run, int(val_set.labels.max()) + 1)
    stepper, share = steppers.build(run, model), schedule(run)
    kernels = [p for p in model.parameters() if steppers.is_kernel(p)]
    norms = [kernel.norm().item() for kernel in kernels]
    steps = run.images // run.batch
    mirrored = torch.rand(run.images, generator=torch.Generator().manual_seed(run.seed)) < 0.5
    curve: dict[str, list[Any]] = {"loss": [], "top_1": [], "val_loss": []}
    for epoch in range(run.epochs):
        generator = torch.Generator().manual_seed(1000 * (run.seed + 1) + epoch)
        order = torch.randperm(run.images, generator=generator)
        boxes = torch.rand(run.images, 4, generator=generator)
        total = 0.0
        for step in range(steps):
            chosen = order[step * run.batch : (step + 1) * run.batch]
            flips = mirrored[chosen] ^ bool(epoch % 2)  # alternating, as in the recipes
            inputs = crops(train_set.pixels[chosen], run, boxes[chosen], flips)
            loss = F.cross_entropy(model(inputs), train_set.labels[chosen], label_smoothing=0.1)
            model.zero_grad()
            loss.backward()
            stepper.step(share(epoch + (step + 0.5) / steps))
            total += loss.item()
        stepper.mode(training=False)
        if stepper.schedule_free:
            settle(model, train_set, run)
        marks = evaluate(model, val_set, run.px)
        stepper.mode(training=True)
        curve["loss"].append(round(total / steps, 4))
        for name, values in marks.items():
            curve[name].append([round(value, 4) for value in values])
        alive()
        if not math.isfinite(total):
            break
    growth = [kernel.norm().item() / norm for kernel, norm in zip(kernels, norms, strict=True)]
    return {
        "run": asdict(run),
        "steps": steps * run.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "diverged": not math.isfinite(total),
        "norm_growth": [round(float(np.median(growth)), 3), round(max(growth), 3)],
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.time() - wall, 1),
    }

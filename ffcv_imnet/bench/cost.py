"""The cost estimate: a run's FLOPs, its minutes and dollars on the machines of two small tables.

One formula carries a throughput from one run to another: the effective TFLOP/s of a GPU on a network,
counted FLOPs of a whole known run over its time, is taken to hold at other resolutions and lengths.
docs/FROM_A_CREDIT_CARD.md says how well that does. A stage of the plan goes as fast as the slower of
the two: the GPUs, or the machine's cores decoding images of the size at which they are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import torch
import yaml
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import IMAGENET_TRAIN_IMAGES, EpochPlan, plan_run
from ffcv_imnet.config.schema import Cost, Settings, Training
from ffcv_imnet.core.errors import UsageError, nearest
from ffcv_imnet.core.log import Epoch
from ffcv_imnet.core.names import quoted
from ffcv_imnet.data.beton import Manifest, manifest_path
from ffcv_imnet.models import build_model
from ffcv_imnet.train.muon import is_kernel, newton_schulz
from ffcv_imnet.train.soap import stacks_of

MACHINES = Path(__file__).with_name("machines.yaml")
THROUGHPUTS = Path(__file__).with_name("throughputs.yaml")
IMAGENET_VAL_IMAGES = 50_000
IMAGENET_CLASSES = 1000
RESERVE = 10.0  # seconds before a limit that are kept for the checkpoint and the end
STORED = 400  # longest side in px at which write_ffcv.py stores images by default
SMALLER = 256  # and one at which decoding keeps up with faster GPUs
SHORTEST = 3 / 3600  # hours; a run of fewer is not worth a table

NO_GPU = "any", "none: a CPU", "not measured"  # a row's first columns


@dataclass(frozen=True)
class Machine:
    """A row of machines.yaml."""

    name: str
    gpu: str
    gpus: int
    vcpus: int
    memory_gb: int
    disk_gb: int
    on_demand: float  # dollars an hour


@dataclass(frozen=True)
class Throughput:
    """Effective TFLOP/s of one GPU among `gpus` on `arch`."""

    tflops: float
    kind: str  # measured, published or estimate
    source: str


def machines() -> dict[str, Machine]:
    """The price table, by name.

    Raises:
        UsageError: the table is not what its header describes.
    """
    found = {}
    for name, row in _table(MACHINES, "machines").items():
        try:
            found[name] = Machine(name=name, **row)
        except TypeError as error:
            raise UsageError(
                f"{MACHINES}: {name}: {str(error).partition(') ')[2] or error}"
            ) from None
    return found


def _table(path: Path, key: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))[key]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path}: not a table with {key!r}: {' '.join(str(error).split())}"
        ) from None


def price(cost: Cost) -> float | None:
    """Dollars an hour by `cost.*`; None where neither a price nor a machine is named.

    Raises:
        UsageError: no such machine.
    """
    if cost.dollars_per_hour is not None or cost.machine is None:
        return cost.dollars_per_hour
    known = machines()
    if cost.machine not in known:
        raise UsageError(
            f"cost.machine {quoted(cost.machine)} is not in {MACHINES}{nearest(cost.machine, known)}: it has "
            f"{', '.join(known)}; add a line, or give cost.dollars_per_hour"
        )
    return known[cost.machine].on_demand


# ---- FLOPs --------------------------------------------------------------------------------------


def image_flops(settings: Settings, classes: int, side: int, training: bool) -> float:
    """FLOPs of one image; a multiplication and an addition are two, as torch counts."""
    of_shape = replace(Settings().training, use_blurpool=settings.training.use_blurpool)
    return _count(Settings(model=settings.model, training=of_shape), classes, side, training)


@cache
def _count(settings: Settings, classes: int, side: int, training: bool) -> float:
    with torch.device("meta"):
        model = build_model(settings, classes).train(training)
        images = torch.empty((2, 3, side, side), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        logits = model(images)
        if training:
            logits.sum().backward()
    return counter.get_total_flops() / len(images)


def step_flops(settings: Settings, classes: int) -> float:
    """FLOPs of Muon's Newton-Schulz iterations or of SOAP's products and rotations in one step; 0 for SGD, whose are
    too few to count. SOAP's turns of its bases, once in soap.every steps, are not counted."""
    if settings.training.optimizer == "sgd":
        return 0.0
    training = replace(Settings().training, optimizer=settings.training.optimizer)
    relevant = Settings(model=settings.model, muon=settings.muon, training=training)
    return _count_step(relevant, classes)


@cache
def _count_step(settings: Settings, classes: int) -> float:
    with torch.device("meta"):
        parameters = list(build_model(settings, classes).parameters())
    if settings.training.optimizer == "soap":  # on each side: the product, into the basis, and back
        stacks, _ = stacks_of(parameters)
        return float(sum(6 * side.width * stack.size for stack in stacks for side in stack.sides))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for kernel in filter(is_kernel, parameters):
            newton_schulz([kernel.flatten(1)[None]], settings.muon.ns_steps)
    return float(counter.get_total_flops())


class Flops(NamedTuple):
    """Floating point operations of a whole run."""

    training: float  # forward and backward of all epochs
    optimizer: float  # of all steps; every GPU makes them all
    validation: float  # all passes


def run_flops(
    settings: Settings, plans: tuple[EpochPlan, ...], val_images: int, classes: int
) -> Flops:
    """Convolutions and matrix products, counted by torch on its meta device: nothing is computed."""
    training = sum(
        plan.images * image_flops(settings, classes, plan.resolution, True) for plan in plans
    )
    optimizer = sum(plan.steps for plan in plans) * step_flops(settings, classes)
    passes = (2 if settings.validation.lr_tta else 1) * (2 if settings.training.ema_decay else 1)
    evaluated = image_flops(settings, classes, settings.validation.resolution, False)
    return Flops(training, optimizer, len(plans) * val_images * passes * evaluated)


# ---- throughputs --------------------------------------------------------------------------------


def throughput(gpu: str, gpus: int, arch: str) -> Throughput | None:
    """What one of `gpus` GPUs makes of `arch`; None where the table knows nothing of the GPU.

    The network's own run if there is one, else the slowest of the GPU's runs; several GPUs from a run
    on one by the table's scaling factor.

    Raises:
        UsageError: the table is not what its header describes.
    """
    rows = [row for row in _table(THROUGHPUTS, "rows") if row.get("gpu") == gpu]
    for row in rows:
        if "of" in row:
            base = throughput(row["of"], gpus, arch)
            if base is None:
                raise UsageError(f"{THROUGHPUTS}: {gpu} is of {row['of']}, which has no row")
            return Throughput(base.tflops * row["factor"], row["kind"], row["source"])
    if not rows:
        return None
    own = [row for row in rows if row["arch"] == arch]
    exact = [row for row in own if row["gpus"] == gpus]
    known = [(_effective(row), row) for row in exact or own or rows]
    tflops, row = min(known, key=lambda pair: pair[0])
    kind, source = row["kind"], row["source"]
    if not own:
        kind, source = "estimate", f"{arch} taken to be as efficient as {row['arch']}: {source}"
    if gpus > row["gpus"]:
        scaling = _table(THROUGHPUTS, "scaling")
        tflops *= scaling["factor"]
        kind, source = "estimate", f"{source}; x {scaling['factor']}: {scaling['source']}"
    elif gpus < row["gpus"]:
        kind, source = "estimate", f"{source}; as one of its {row['gpus']}"
    return Throughput(tflops, kind, source)


def _effective(row: dict[str, Any]) -> float:
    try:
        overrides = {key.replace(".", "__"): value for key, value in row["settings"].items()}
        settings = load(**{"model__arch": row["arch"], **overrides})
        plans = plan_run(settings, row.get("images", IMAGENET_TRAIN_IMAGES))
        flops = run_flops(
            settings,
            plans,
            row.get("val_images", IMAGENET_VAL_IMAGES),
            row.get("classes", IMAGENET_CLASSES),
        )
        return sum(flops) / (row["minutes"] * 60 * row["gpus"]) / 1e12
    except (KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{THROUGHPUTS}: a row lacks or mistakes {error}: {row}") from None


# ---- decoding -----------------------------------------------------------------------------------


def stored_side(settings: Settings) -> int:
    """Longest side, px, at which the images of `data.train_dataset` are stored; the writer's default
    where there is no such file yet."""
    path = manifest_path(Path(settings.data.train_dataset))
    if not path.is_file():
        return STORED
    said = Manifest.load(path).settings
    if said.get("short_side"):
        return round(said["short_side"] * 4 / 3)  # most images are 4 to 3
    return said.get("max_resolution") or 500  # ImageNet's own size


def decode_rate(stored: int, crop_scale: float, resolution: int) -> float:
    """Images a second that one virtual core decodes: the measured row that is not easier than this.

    Args:
        stored: longest side of the stored image, px.
        crop_scale: the smallest area of a crop over its image's.
        resolution: side of the crop, px.

    Raises:
        UsageError: the table is not what its header describes.
    """
    table = _table(THROUGHPUTS, "decoding")
    try:
        sizes: dict[int, Any] = table["images_per_second"]
        of_size = sizes[min((size for size in sizes if size >= stored), default=max(sizes))]
        scales = [scale for scale in of_size if scale >= crop_scale]
        of_crop = of_size[min(scales, default=max(of_size))]
        sides = [side for side in of_crop if side >= resolution]
        return float(of_crop[min(sides, default=max(of_crop))] * table["a_vcpu"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{THROUGHPUTS}: decoding lacks or mistakes {error}") from None


# ---- the estimate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageSpeed:
    """Epochs of one resolution on a machine; images a second of the whole machine."""

    resolution: int
    images: int  # trained on in all of them
    gpu: float  # what its GPUs can train on
    loader: float  # what its cores can decode

    @property
    def seconds(self) -> float:
        """Of training, at the slower of the two."""
        return self.images / min(self.gpu, self.loader)

    @property
    def limit(self) -> str:
        """What holds it up: decoding or GPU."""
        return "decoding" if self.loader < self.gpu else "GPU"


@dataclass(frozen=True)
class Line:
    """A run on a machine."""

    machine: Machine
    throughput: Throughput
    stages: tuple[StageSpeed, ...]
    validation: float  # seconds of all passes

    @property
    def hours(self) -> float:
        """Of training and validation."""
        return (sum(stage.seconds for stage in self.stages) + self.validation) / 3600

    @property
    def limit(self) -> str:
        """GPU, decoding, or the resolutions at which it is decoding."""
        slow = [stage.resolution for stage in self.stages if stage.limit == "decoding"]
        if not slow or len(slow) == len(self.stages):
            return "decoding" if slow else "GPU"
        return f"decoding at {', '.join(map(str, slow))} px"

    @property
    def cost(self) -> float:
        """Dollars of the training alone, on demand."""
        return self.hours * self.machine.on_demand


def estimate(
    settings: Settings,
    plans: tuple[EpochPlan, ...],
    val_images: int = IMAGENET_VAL_IMAGES,
    classes: int = IMAGENET_CLASSES,
    stored: int | None = None,
) -> list[Line]:
    """The run on every machine of the table whose GPU has a throughput, with images stored at
    `stored` px (default: those of `data.train_dataset`)."""
    validation = run_flops(settings, plans, val_images, classes).validation
    stored = stored or stored_side(settings)
    lines = []
    for machine in machines().values():
        known = throughput(machine.gpu, machine.gpus, settings.model.arch)
        if known is None:
            continue
        speed = known.tflops * 1e12 * machine.gpus  # FLOP/s
        update = machine.gpus * step_flops(settings, classes)  # every GPU makes it whole
        stages = []
        for (side, batch, scale), same in groupby(
            plans, lambda plan: (plan.resolution, plan.batch_size, plan.crop_scale[0])
        ):
            trained = speed / (image_flops(settings, classes, side, True) + update / batch)
            decoded = machine.vcpus * decode_rate(stored, scale, side)
            stages.append(StageSpeed(side, sum(plan.images for plan in same), trained, decoded))
        lines.append(Line(machine, known, tuple(stages), validation / speed))
    return lines


def describe(
    settings: Settings,
    plans: tuple[EpochPlan, ...],
    val_images: int = IMAGENET_VAL_IMAGES,
    classes: int = IMAGENET_CLASSES,
) -> str:
    """The estimate as text: FLOPs, a table of machines, the sources of every figure."""
    stored = stored_side(settings)
    lines = estimate(settings, plans, val_images, classes, stored)
    if all(line.hours < SHORTEST for line in lines):
        return (
            f"cost estimate: seconds on each of the {len(lines)} machines of {MACHINES},\n"
            f"fewer than a run takes to start"
        )
    others = estimate(settings, plans, val_images, classes, SMALLER)
    training, optimizer, validation = (
        value / 1e15 for value in run_flops(settings, plans, val_images, classes)
    )
    parts = [f"{training:,.2f} PFLOP of training"]
    if optimizer:
        name = {"muon": "Muon", "soap": "SOAP"}[settings.training.optimizer]
        parts.append(f"{optimizer:,.2f} of {name}")
    parts.append(f"{validation:,.2f} of validation")
    return (
        f"cost estimate: {' + '.join(parts)} ({val_images:,} images)\n\n"
        f"{_describe_lines(lines, others, stored)}"
        f"  img/s, thousands: what the GPUs can train on / what the cores decode of images stored at {stored} px;\n"
        f"  limit: the slower of the two; decoding: store smaller (write_ffcv.py --max_resolution {SMALLER})\n"
        f"  or take more cores; min: the slower at every resolution, and the validation\n"
        f"  not in it: booting, copying the data, compilation, disks. On the machine itself add --measure"
    )


def _minutes(line: Line) -> str:
    minutes = 60 * line.hours
    return f"{minutes:,.0f}" if minutes >= 10 else f"{minutes:.1f}"


def _describe_lines(lines: Sequence[Line], others: Sequence[Line], stored: int) -> str:
    """The table of machines and the notes of its sources; `lines` are with images stored at `stored` px,
    `others` with smaller ones."""
    decoding = f"decoding: {_table(THROUGHPUTS, 'decoding')['source']}"
    sources = [*dict.fromkeys(line.throughput.source for line in lines), decoding]

    def speed(stage: StageSpeed) -> str:
        return f"{stage.gpu / 1000:.1f} / {stage.loader / 1000:.1f}"

    rows, speeds = [], []
    for line, other in zip(lines, others, strict=True):
        kind = f"{line.throughput.kind} [{sources.index(line.throughput.source) + 1}]"
        row = [
            line.machine.name,
            f"{line.machine.gpus} x {line.machine.gpu}",
            f"{line.throughput.tflops:.1f} {kind}",
            _minutes(line),
            f"${line.cost:,.2f}",
        ]
        rows.append(row + ([_minutes(other)] if stored != SMALLER else []))
        speeds.append([line.machine.name, line.machine.vcpus, *map(speed, line.stages), line.limit])
    rows.append([*NO_GPU])
    columns = [
        *("machine", "GPUs", "TFLOP/s a GPU"),
        *(f"min at {stored} px", "on demand", f"min at {SMALLER} px"),
    ]
    sides = [f"{stage.resolution} px" for stage in lines[0].stages]
    compared = tabulate(
        speeds,
        [f"img/s [{len(sources)}]", "vCPUs", *sides, "limit"],
        disable_numparse=True,
        stralign="right",
    )
    table = tabulate(rows, columns[: len(rows[0])], disable_numparse=True, stralign="right")
    dated = yaml.safe_load(MACHINES.read_text(encoding="utf-8"))
    seen = "verified" if dated.get("verified") else "not verified at the seller"
    notes = [f"  [{number}] {source}" for number, source in enumerate(sources, 1)]
    notes.append(f"  prices of {dated.get('date')}, {seen}: {MACHINES}; throughputs: {THROUGHPUTS}")
    return (
        f"{table}\n\n{compared}\n\n"
        + "\n".join(
            fill(note, 100, subsequent_indent="      ", break_long_words=False) for note in notes
        )
        + "\n"
    )


# ---- limits -------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Limit:
    """When a run must end."""

    seconds: float  # since it began, all its parts
    name: str  # of the setting, with its value


def limit(training: Training, dollars_per_hour: float | None) -> Limit | None:
    """The nearer of `training.max_hours` and `training.max_cost`; None where neither is set."""
    limits = []
    if training.max_hours:
        name = f"training.max_hours {training.max_hours:g}"
        limits.append(Limit(training.max_hours * 3600, name))
    if training.max_cost and dollars_per_hour:
        seconds = training.max_cost / dollars_per_hour * 3600
        limits.append(Limit(seconds, f"training.max_cost {training.max_cost:g}"))
    return min(limits, default=None)


def training_seconds(limit: Limit | None, epochs: list[Epoch]) -> float:
    """Seconds since the run began after which no further step is made.

    Early enough for a checkpoint, and for the validation that may stand before it.
    """
    if limit is None:
        return float("inf")
    return limit.seconds - RESERVE - (epochs[-1].val_seconds if epochs else 0.0)

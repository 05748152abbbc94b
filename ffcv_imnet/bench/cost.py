"""The bill beforehand: operations of a run, hours and dollars on the machines of two small tables.

One formula carries a throughput from one run to another: the effective TFLOP/s of a GPU on a network,
counted operations of a whole known run over its time, is taken to hold at other resolutions and lengths.
docs/FROM_A_CREDIT_CARD.md says how well that does.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import IMAGENET_TRAIN_IMAGES, EpochPlan, plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import UsageError, nearest
from ffcv_imnet.core.log import Epoch
from ffcv_imnet.models import build_model
from ffcv_imnet.train.muon import is_kernel, newton_schulz

MACHINES = Path(__file__).with_name("machines.yaml")
THROUGHPUTS = Path(__file__).with_name("throughputs.yaml")
IMAGENET_VAL_IMAGES = 50_000
IMAGENET_CLASSES = 1000
RESERVE = 10.0  # seconds before a limit that are kept for the checkpoint and the end


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
    spot: float | None = None


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


def price(settings: Settings) -> float | None:
    """Dollars an hour by `cost.*`; None where neither a price nor a machine is named.

    Raises:
        UsageError: no such machine.
    """
    cost = settings.cost
    if cost.dollars_per_hour is not None or cost.machine is None:
        return cost.dollars_per_hour
    known = machines()
    if cost.machine not in known:
        raise UsageError(
            f"cost.machine {cost.machine!r} is not in {MACHINES}{nearest(cost.machine, known)}: it has "
            f"{', '.join(known)}; add a line, or give cost.dollars_per_hour"
        )
    return known[cost.machine].on_demand


# ---- operations ---------------------------------------------------------------------------------


def image_flops(settings: Settings, classes: int, side: int, training: bool) -> float:
    """Operations on one image; a multiplication and an addition are two, as torch counts."""
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
    """Operations of Muon's Newton-Schulz iterations in one step; 0 for SGD, whose are too few to count."""
    if settings.training.optimizer != "muon":
        return 0.0
    return _count_step(Settings(model=settings.model, muon=settings.muon), classes)


@cache
def _count_step(settings: Settings, classes: int) -> float:
    with torch.device("meta"):
        kernels = [p for p in build_model(settings, classes).parameters() if is_kernel(p)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for kernel in kernels:
            newton_schulz(kernel.flatten(1)[None], settings.muon.ns_steps, torch.float32)
    return float(counter.get_total_flops())


class Operations(NamedTuple):
    """Floating point operations of a whole run."""

    training: float  # forward and backward of all epochs
    optimizer: float  # of all steps; every GPU makes them all
    validation: float  # all passes


def run_flops(
    settings: Settings, plans: tuple[EpochPlan, ...], val_images: int, classes: int
) -> Operations:
    """Convolutions and matrix products, counted by torch on its meta device: nothing is computed."""
    training = sum(
        plan.images * image_flops(settings, classes, plan.resolution, True) for plan in plans
    )
    optimizer = sum(plan.steps for plan in plans) * step_flops(settings, classes)
    passes = (2 if settings.validation.lr_tta else 1) * (2 if settings.training.ema_decay else 1)
    judged = image_flops(settings, classes, settings.validation.resolution, False)
    return Operations(training, optimizer, len(plans) * val_images * passes * judged)


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


# ---- the bill -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A run on a machine."""

    machine: Machine
    hours: float
    images_a_vcpu: float  # training images a second that each virtual core must decode
    throughput: Throughput

    def cost(self, dollars_per_hour: float | None) -> float | None:
        """Dollars of the training alone."""
        return None if dollars_per_hour is None else self.hours * dollars_per_hour


def bill(
    settings: Settings,
    plans: tuple[EpochPlan, ...],
    val_images: int = IMAGENET_VAL_IMAGES,
    classes: int = IMAGENET_CLASSES,
) -> list[Line]:
    """The run on every machine of the table whose GPU has a throughput."""
    operations = run_flops(settings, plans, val_images, classes)
    images = sum(plan.images for plan in plans)
    lines = []
    for machine in machines().values():
        known = throughput(machine.gpu, machine.gpus, settings.model.arch)
        if known is not None:
            speed = known.tflops * 1e12 * machine.gpus
            training = (operations.training + machine.gpus * operations.optimizer) / speed
            hours = (training + operations.validation / speed) / 3600
            lines.append(Line(machine, hours, images / training / machine.vcpus, known))
    return lines


def describe(
    settings: Settings,
    plans: tuple[EpochPlan, ...],
    val_images: int = IMAGENET_VAL_IMAGES,
    classes: int = IMAGENET_CLASSES,
) -> str:
    """The bill as text: operations, a table of machines, the sources of every figure."""
    operations = run_flops(settings, plans, val_images, classes)
    lines = bill(settings, plans, val_images, classes)
    sources = list(dict.fromkeys(line.throughput.source for line in lines))

    training, optimizer, validation = (value / 1e15 for value in operations)
    parts = [f"{training:,.2f} PFLOP of training"]
    if optimizer:
        parts.append(f"{optimizer:,.2f} of Muon ({optimizer / training:.1%} of it)")
    parts.append(f"{validation:,.2f} of validation")

    def dollars(value: float | None) -> str:
        return "-" if value is None else f"${value:,.2f}"

    rows = [
        (
            line.machine.name,
            f"{line.machine.gpus} x {line.machine.gpu}",
            f"{line.throughput.tflops:.1f}",
            f"{line.throughput.kind} [{sources.index(line.throughput.source) + 1}]",
            f"{line.images_a_vcpu:,.0f}",
            f"{line.hours:.2f}",
            dollars(line.cost(line.machine.on_demand)),
            dollars(line.cost(line.machine.spot)),
        )
        for line in lines
    ]
    columns = (
        *("machine", "GPUs", "TFLOP/s a GPU", "throughput", "img/s a vCPU"),
        *("hours", "on demand", "spot"),
    )
    table = tabulate(rows, columns, disable_numparse=True, stralign="right")
    dated = yaml.safe_load(MACHINES.read_text(encoding="utf-8"))
    notes = "".join(f"  [{number}] {source}\n" for number, source in enumerate(sources, 1))
    seen = "verified" if dated.get("verified") else "not verified at the seller"
    return (
        f"the bill: {' + '.join(parts)} ({val_images:,} images)\n\n{table}\n\n{notes}"
        f"  prices of {dated.get('date')}, {seen}: {MACHINES}; throughputs: {THROUGHPUTS}\n"
        f"  img/s a vCPU: what decoding must keep up with; the hours hold only if it does\n"
        f"  not in it: booting, copying the data, disks. On the machine itself add --measure"
    )


# ---- limits -------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Limit:
    """When a run must end."""

    seconds: float  # since it began, all its parts
    name: str  # of the setting, with its value


def limit(settings: Settings, dollars_per_hour: float | None) -> Limit | None:
    """The nearer of `training.max_hours` and `training.max_cost`; None where neither is set."""
    training = settings.training
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

"""How fast this machine loads, steps, and does both at once; from that, how long the run will take."""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from tabulate import tabulate

from ffcv_imnet import checkpoint
from ffcv_imnet.checkpoint import Trained
from ffcv_imnet.data import Batches, TrainLoader, ValLoader, check_data
from ffcv_imnet.distributed import StopSignal, World, connect, describe_world, disconnect
from ffcv_imnet.evaluation import evaluate
from ffcv_imnet.schedules import EpochPlan, plan_run
from ffcv_imnet.settings import Settings
from ffcv_imnet.training import build_learner, train_epoch

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
    """A loader that notes when it was asked for each batch, and may end early."""

    def __init__(self, source: Callable[[], Batches], samples: int = 0) -> None:
        self.source, self.samples = source, samples
        self.asked: list[float] = []
        self.first_batch = 0.0
        self.until = float("inf")

    def batches(self) -> Batches:
        with closing(self.source()) as source:
            while len(self.asked) < PILOT_STEPS or time.perf_counter() < self.until:
                asked = time.perf_counter()
                batch = next(source, None)
                if batch is None:
                    return
                if not self.asked:
                    self.first_batch = time.perf_counter() - asked
                self.asked.append(asked)
                yield batch

    def epoch(self, plan: EpochPlan, first_step: int = 0) -> Batches:
        return self.batches()

    def seconds_a_batch(self, end: float) -> float:
        """Mean, without the first one, which starts threads, where there is another."""
        spans = [b - a for a, b in pairwise([*self.asked, end])]
        later = spans[1:] or spans
        return sum(later) / len(later)


def _no_signals() -> StopSignal:
    """Nothing to obey: Ctrl-C ends a measurement as it ends any command."""
    stop = StopSignal.__new__(StopSignal)
    stop.received = None
    return stop


def measure(
    learner: checkpoint.Learner,
    loader: TrainLoader,
    plan: EpochPlan,
    settings: Settings,
    world: World,
    seconds: float = 30.0,
) -> Rates:
    """Measure the loader alone, the step alone and both, at `plan`'s resolution and batch.

    Takes about `seconds` after the warm-up, longer where a few steps take longer. The step is that
    of `train_epoch` with a learning rate next to zero. All processes of `world` call it together.

    Raises:
        RunError: the loader failed.
    """
    still = replace(
        settings,
        lr=replace(settings.lr, lr=1e-12),
        training=replace(settings.training, checkpoint_minutes=0.0),
    )

    def steps(source: Callable[[], Batches], count: int) -> tuple[_Timed, float]:
        timed = _Timed(source)
        short = replace(plan, steps=count)
        batches = cast(TrainLoader, timed)
        train_epoch(learner, batches, short, still, world, _no_signals(), Trained())
        return timed, timed.seconds_a_batch(time.perf_counter())

    def agree(share: float, a_batch: float) -> int:
        """Steps that fill a share of the time: the same number on every process."""
        wanted = torch.tensor(share * seconds / a_batch, dtype=torch.float64, device=world.device)
        return min(plan.steps, max(PILOT_STEPS, round(float(world.sum(wanted)) / world.size)))

    def real() -> Batches:
        return loader.epoch(plan)

    started = time.perf_counter()
    pilot_steps = min(PILOT_STEPS, plan.steps)
    _, a_batch = steps(real, pilot_steps)
    pilot = time.perf_counter() - started

    alone = _Timed(real)
    alone.until = time.perf_counter() + SHARES[0] * seconds
    for images, labels in alone.batches():
        last = images, labels
    loading = alone.seconds_a_batch(time.perf_counter())
    kept = last[0].clone(), last[1].clone()  # the loader reuses its buffers

    def same() -> Batches:
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
        warm_up=max(0.0, pilot - together.first_batch - pilot_steps * a_batch),
    )


@dataclass(frozen=True)
class Measured:
    """What a run on this machine will take, from measurements."""

    start_up: float  # seconds from the script's start to the first epoch
    rates: tuple[Rates, ...]  # one for each resolution of the plan
    validation: float  # seconds of the passes after one epoch
    checkpoint: float  # seconds to save one
    device: str
    plans: tuple[EpochPlan, ...]

    def epoch_seconds(self, plan: EpochPlan) -> float:
        """Training, validation and checkpoint of one epoch."""
        rate = next(rate for rate in self.rates if rate.resolution == plan.resolution)
        training = rate.first_batch + plan.images / rate.both
        return training + self.validation + self.checkpoint

    def run_seconds(self) -> float:
        """The whole run, start-up and compilation included."""
        warm_up = sum(rate.warm_up for rate in self.rates)
        return self.start_up + warm_up + sum(map(self.epoch_seconds, self.plans))


def measure_run(settings: Settings, started: float, seconds: float = 30.0) -> Measured | None:
    """Measure every resolution of the plan, validation and checkpoint, on the data of `settings`.

    Leaves no file behind. Under torchrun only the first process gets the result, the others None.

    Args:
        started: `time.perf_counter()` when the script started.
        seconds: of measuring at each resolution.

    Raises:
        UsageError, RunError: as training would raise them.
    """
    world = describe_world()
    train_set, val_set = check_data(settings)
    plans = plan_run(settings, train_set.samples)
    connect(world)
    loader = TrainLoader(settings.data.train_dataset, train_set.samples, settings, world)
    val_loader = ValLoader(settings.data.val_dataset, val_set.samples, settings, world)
    learner = build_learner(settings, len(train_set.classes), world)
    start_up = time.perf_counter() - started

    first = {plan.resolution: plan for plan in reversed(plans)}
    rates = tuple(
        measure(learner, loader, first[side], settings, world, seconds) for side in sorted(first)
    )
    measured = Measured(
        start_up=start_up,
        rates=rates,
        validation=_validation_seconds(learner, val_loader, world, settings, seconds / 3),
        checkpoint=_checkpoint_seconds(learner, Path(settings.logging.folder)),
        device=world.device_name(),
        plans=plans,
    )
    disconnect(world)
    return measured if world.is_main else None


def _validation_seconds(
    learner: checkpoint.Learner,
    loader: ValLoader,
    world: World,
    settings: Settings,
    seconds: float,
) -> float:
    """All passes after one epoch, warmed up."""
    tta = settings.validation.lr_tta
    for budget in (0.0, seconds):  # the first one compiles
        timed = _Timed(loader.batches, loader.samples)
        timed.until = time.perf_counter() + budget
        evaluate(learner.judge, cast(ValLoader, timed), world, learner.dtype, tta=tta)
        a_batch = timed.seconds_a_batch(time.perf_counter())
    batches = -(-loader.samples // (loader.local_batch * world.size))
    return (timed.first_batch + batches * a_batch) * (1 if learner.ema is None else 2)


def _checkpoint_seconds(learner: checkpoint.Learner, folder: Path) -> float:
    """Saved once on the disk of the run's folder, and deleted."""
    parent = next((path for path in (folder, *folder.parents) if path.is_dir()), Path())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".measure_") as temporary:
        started = time.perf_counter()
        checkpoint.save(checkpoint.state_of(learner, {}), Path(temporary) / "measure.pt")
        return time.perf_counter() - started


def bottleneck(rate: Rates, on_gpu: bool) -> tuple[str, str]:
    """What limits training at this resolution, and what to change."""
    if rate.loader < 1.15 * rate.step:
        return "loader", (
            "decoding limits: more cores, or images stored smaller (write_ffcv.py --max_resolution, "
            "--jpeg_quality)"
        )
    if not on_gpu:
        return "processor", (
            "the processor computes and decodes: a GPU, more cores, a lower resolution, or images "
            "stored smaller"
        )
    if rate.both < 0.85 * rate.step:
        return "transfer", (
            "loader and step disturb each other: more cores, or more data.batches_ahead"
        )
    return "step", (
        "the GPU limits: training.compile=true, a larger training.batch_size, a lower resolution, "
        "or a faster GPU; more cores would not help"
    )


def describe(measured: Measured, price: float | None) -> str:
    """The measurements as a table, what limits, and the predicted duration and cost."""
    on_gpu = torch.cuda.is_available()
    rows = []
    for rate in measured.rates:
        of_it = [plan for plan in measured.plans if plan.resolution == rate.resolution]
        seconds = measured.epoch_seconds(of_it[0])
        what = bottleneck(rate, on_gpu)[0]
        speeds = [f"{value:,.0f}" for value in (rate.loader, rate.step, rate.both)]
        rows.append((rate.resolution, *speeds, what, len(of_it), f"{seconds:,.1f}"))
    columns = "px", "loader img/s", "step img/s", "both img/s", "limit", "epochs", "s an epoch"
    table = tabulate(rows, columns, disable_numparse=True, stralign="right")
    advice = dict.fromkeys(bottleneck(rate, on_gpu)[1] for rate in measured.rates)
    total = measured.run_seconds()
    cost = f", ${total / 3600 * price:,.2f} at ${price:g} an hour" if price is not None else ""
    return (
        f"measured on {measured.device}\n\n{table}\n\n" + "".join(f"{a}\n" for a in advice) + "\n"
        f"start-up {measured.start_up:.1f} s, compilation and tuning "
        f"{sum(rate.warm_up for rate in measured.rates):.1f} s, validation {measured.validation:.1f} s "
        f"and checkpoint {measured.checkpoint:.1f} s an epoch\n"
        f"this run will take {total:,.0f} s ({total / 3600:.2f} h){cost}"
    )

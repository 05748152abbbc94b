"""How fast this machine loads, steps, and does both at once; from that, how long the run will take."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from tabulate import tabulate

from ffcv_imnet.config.schedules import EpochPlan, plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.data.beton import Manifest
from ffcv_imnet.data.loader import Batches, TrainLoader, ValLoader, check_data
from ffcv_imnet.machine.distributed import World, connect, describe_world, disconnect, together
from ffcv_imnet.train import checkpoint
from ffcv_imnet.train.checkpoint import Trained
from ffcv_imnet.train.epoch import build_learner, train_epoch
from ffcv_imnet.train.validate import evaluate
from ffcv_imnet.train.watch import Watch

# Of the seconds given, what the loader alone, the step alone and both together get: the prediction
# rests on the last.
SHARES = (1 / 12, 1 / 4, 2 / 3)
ROUNDS = 2  # over all resolutions: a shared machine is faster in one minute than in the next
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

    waited = 0.0  # of no use here

    def __init__(self, source: Callable[[], Batches], samples: int = 0) -> None:
        self.source, self.samples = source, samples
        self.asked: list[float] = []
        self.first_batch = 0.0
        self.ended = 0.0
        self.until = float("inf")

    def batches(self) -> Batches:
        source = self.source()
        try:
            while len(self.asked) < PILOT_STEPS or time.perf_counter() < self.until:
                asked = time.perf_counter()
                batch = next(source, None)
                if batch is None:
                    return
                if not self.asked:
                    self.first_batch = time.perf_counter() - asked
                self.asked.append(asked)
                yield batch
        finally:
            # Stopping a loader in mid-epoch takes it a second or two that no whole epoch spends.
            self.ended = time.perf_counter()
            source.close()

    def epoch(self, plan: EpochPlan, first_step: int = 0) -> Batches:
        return self.batches()

    @property
    def seconds(self) -> float:
        """From the first question to the end of the last batch's step."""
        return self.ended - self.asked[0]

    @property
    def seconds_a_batch(self) -> float:
        """Mean, without the first one, which starts threads, where there is another."""
        spans = [b - a for a, b in pairwise([*self.asked, self.ended])]
        later = spans[1:] or spans
        return sum(later) / len(later)

    def warm_up(self, a_batch: float, first_batch: float) -> float:
        """Seconds that these batches took more than they will, warm."""
        return max(0.0, self.seconds - len(self.asked) * a_batch - first_batch)


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
    still = replace(settings.schedule, lr=1e-12)

    def steps(source: Callable[[], Batches], count: int) -> _Timed:
        timed = _Timed(source)
        short = replace(plan, steps=count)
        batches = cast(TrainLoader, timed)
        watch = Watch(world, listen=False)  # Ctrl-C ends a measurement as it ends any command
        train_epoch(learner, batches, short, still, Trained(), watch)
        return timed

    def agree(share: float) -> int:
        """Steps that fill a share of the time: the same number on every process."""
        steps = share * seconds / pilot.seconds_a_batch
        wanted = torch.tensor(steps, dtype=torch.float64, device=world.device)
        return min(plan.steps, max(PILOT_STEPS, round(float(world.sum(wanted)) / world.size)))

    real = partial(loader.epoch, plan)
    pilot = steps(real, min(PILOT_STEPS, plan.steps))
    alone = _Timed(real)
    alone.until = time.perf_counter() + SHARES[0] * seconds
    for images, labels in alone.batches():
        last = images, labels
    kept = last[0].clone(), last[1].clone()  # the loader reuses its buffers

    def same() -> Batches:
        while True:
            yield kept

    still_batch = steps(same, agree(SHARES[1]))
    together = steps(real, agree(SHARES[2]))
    return Rates(
        resolution=plan.resolution,
        loader=plan.batch_size / alone.seconds_a_batch,
        step=plan.batch_size / still_batch.seconds_a_batch,
        both=plan.batch_size / together.seconds_a_batch,
        first_batch=together.first_batch,
        warm_up=pilot.warm_up(together.seconds_a_batch, together.first_batch),
    )


def mean(rounds: Sequence[Rates]) -> Rates:
    """Of several measurements at one resolution: equal numbers of images, so their times are averaged.

    The warm-up is the first one's.
    """

    def rate(values: list[float]) -> float:
        return len(values) / sum(1 / value for value in values)

    return replace(
        rounds[0],
        loader=rate([r.loader for r in rounds]),
        step=rate([r.step for r in rounds]),
        both=rate([r.both for r in rounds]),
        first_batch=sum(r.first_batch for r in rounds) / len(rounds),
    )


@dataclass(frozen=True)
class Measured:
    """What a run on this machine will take, from measurements."""

    start_up: float  # seconds from the script's start to the first epoch
    rates: tuple[Rates, ...]  # one for each resolution of the plan
    validation: float  # seconds of the passes after one epoch
    validation_warm_up: float  # that the first of them takes more
    checkpoint: float  # seconds to save one
    device: str
    plans: tuple[EpochPlan, ...]
    on_gpu: bool = False

    def epoch_seconds(self, plan: EpochPlan) -> float:
        """Training, validation and checkpoint of one epoch."""
        rate = next(rate for rate in self.rates if rate.resolution == plan.resolution)
        training = rate.first_batch + plan.images / rate.both
        return training + self.validation + self.checkpoint

    def run_seconds(self) -> float:
        """The whole run, start-up and compilation included."""
        return self.start_up + self.warm_up + sum(map(self.epoch_seconds, self.plans))

    @property
    def warm_up(self) -> float:
        """Seconds of compilation and tuning in the whole run."""
        return self.validation_warm_up + sum(rate.warm_up for rate in self.rates)


def measure_run(settings: Settings, started: float, seconds: float = 30.0) -> Measured | None:
    """Measure every resolution of the plan, validation and checkpoint, on the data of `settings`.

    Leaves no file behind but what torch.compile keeps beside the runs. Under torchrun only the first process gets the
    result, the others None.

    Args:
        started: `time.perf_counter()` when the script started.
        seconds: of measuring at each resolution.

    Raises:
        UsageError, RunError: as training would raise them.
    """
    timeout = settings.distributed.timeout_seconds
    world = describe_world(settings.training.device)
    train_set, val_set = check_data(settings.data, world)
    connect(world, timeout)
    with together(world, timeout, "while they measured"):
        measured = _measured(settings, train_set, val_set, world, started, seconds)
    disconnect(world)
    return measured if world.is_main else None


def _measured(
    settings: Settings,
    train_set: Manifest,
    val_set: Manifest,
    world: World,
    started: float,
    seconds: float,
) -> Measured:
    """Of all processes together; the checkpoint's time is the first one's, who alone writes them."""
    plans = plan_run(settings, train_set.samples)
    loader = TrainLoader(settings.data.train_dataset, train_set.samples, settings, world)
    val_loader = ValLoader(settings.data.val_dataset, val_set.samples, settings, world)
    learner = build_learner(settings, len(train_set.classes), world)
    start_up = time.perf_counter() - started

    first = {plan.resolution: plan for plan in reversed(plans)}
    rounds = [
        [
            measure(learner, loader, first[side], settings, world, seconds / ROUNDS)
            for side in sorted(first)
        ]
        for _ in range(ROUNDS)
    ]
    rates = tuple(mean(of_one) for of_one in zip(*rounds, strict=True))
    validation, validation_warm_up = _validation_seconds(
        learner, val_loader, world, settings, seconds / 3
    )
    folder = Path(settings.logging.folder)
    return Measured(
        start_up=start_up,
        rates=rates,
        validation=validation,
        validation_warm_up=validation_warm_up,
        checkpoint=_checkpoint_seconds(learner, folder) if world.is_main else 0.0,
        device=world.device_name(),
        plans=plans,
        on_gpu=world.device.type == "cuda",
    )


def _validation_seconds(
    learner: checkpoint.Learner,
    loader: ValLoader,
    world: World,
    settings: Settings,
    seconds: float,
) -> tuple[float, float]:
    """All passes after one epoch, and what the first one takes more, for it compiles."""

    def evaluate_for(budget: float) -> _Timed:
        timed = _Timed(loader.batches, loader.samples)
        timed.until = time.perf_counter() + budget
        tta = settings.validation.lr_tta
        evaluate(learner.eval_forward, cast(ValLoader, timed), world, learner.dtype, tta=tta)
        return timed

    cold, warm = evaluate_for(0.0), evaluate_for(seconds)
    batches = -(-loader.samples // (loader.local_batch * world.size))
    one = warm.first_batch + batches * warm.seconds_a_batch
    passes = 1 if learner.ema is None else 2
    return passes * one, cold.warm_up(warm.seconds_a_batch, warm.first_batch)


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
    rows = []
    for rate in measured.rates:
        of_it = [plan for plan in measured.plans if plan.resolution == rate.resolution]
        seconds = measured.epoch_seconds(of_it[0])
        what = bottleneck(rate, measured.on_gpu)[0]
        speeds = [f"{value:,.0f}" for value in (rate.loader, rate.step, rate.both)]
        rows.append((rate.resolution, *speeds, what, len(of_it), f"{seconds:,.1f}"))
    columns = "px", "loader img/s", "step img/s", "both img/s", "limit", "epochs", "s an epoch"
    table = tabulate(rows, columns, disable_numparse=True, stralign="right")
    advice = dict.fromkeys(bottleneck(rate, measured.on_gpu)[1] for rate in measured.rates)
    total = measured.run_seconds()
    cost = f", ${total / 3600 * price:,.2f} at ${price:g} an hour" if price is not None else ""
    return (
        f"measured on {measured.device}\n\n{table}\n\n" + "".join(f"{a}\n" for a in advice) + "\n"
        f"start-up {measured.start_up:.1f} s, compilation and tuning "
        f"{measured.warm_up:.1f} s, validation {measured.validation:.1f} s "
        f"and checkpoint {measured.checkpoint:.1f} s an epoch\n"
        f"this run will take {total:,.0f} s ({total / 3600:.2f} h){cost}"
    )

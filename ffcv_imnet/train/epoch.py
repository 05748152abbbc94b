"""One epoch forward."""

import inspect
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch._dynamo
import torch._dynamo.utils
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from ffcv_imnet.config.schedules import EpochPlan, learning_rate, resolutions
from ffcv_imnet.config.schema import Lr, Settings
from ffcv_imnet.core.errors import NonFiniteLoss, UsageError
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.loader import PADDING, TrainLoader
from ffcv_imnet.machine.device import choose_precision
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.machine.host import keep_compilations
from ffcv_imnet.models import build_model
from ffcv_imnet.models.parts import freeze, needs_parts, parameters_of, parts_of
from ffcv_imnet.train.augment import build_augment
from ffcv_imnet.train.checkpoint import Learner, Trained
from ffcv_imnet.train.norms import Norms
from ffcv_imnet.train.objective import objective
from ffcv_imnet.train.optim import build_average, build_optimizer
from ffcv_imnet.train.watch import Watch


def build_learner(settings: Settings, classes: int, world: World) -> Learner:
    """Network, optimizer, loss scaler and average, with fresh weights, on the world's device."""
    training = settings.training
    device = world.device
    torch.backends.cudnn.benchmark = True  # shapes change once a resolution, not once a step
    torch.set_float32_matmul_precision("high")
    network = build_model(settings, classes)
    parts = parts_of(network, settings, classes) if needs_parts(settings) else None
    frozen = freeze(parts, settings.model.freeze) if parts is not None else ()
    model = network.to(device).to(memory_format=torch.channels_last)
    ema = build_average(model, training.ema_decay)
    precision = choose_precision(training.precision, device)

    forward: nn.Module = model
    eval_forward: nn.Module = model
    ema_eval_forward = ema.module if ema is not None else None
    if training.compile:
        keep_compilations(Path(settings.logging.folder).parent)
        # One graph for each resolution, in training and in evaluation: static shapes are faster.
        torch._dynamo.config.recompile_limit = 2 * len(resolutions(settings)) + 6
        forward, eval_forward = compile_static(model), compile_static(model)
        ema_eval_forward = (
            compile_static(ema_eval_forward) if ema_eval_forward is not None else None
        )
    if world.size > 1:
        # Around the compiled network, not compiled itself: dynamo breaks at DDP's forward and then goes on
        # only in code that is not torch's own, so that the network falls into pieces, or, where it is made of
        # torch's modules alone, is not compiled. This way round dynamo still cuts its one graph at DDP's buckets
        # (torch's DDPOptimizer), so that gradients travel during backward.
        # Statistics are made equal once an epoch (World.share), not broadcast at every step.
        # torch 2.11 has the other name.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
        forward = DistributedDataParallel(forward, **options)
    return Learner(
        model=model,
        optimizer=build_optimizer(model, settings, precision, parts.head if parts else None),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        ema=ema,
        forward=forward,
        eval_forward=eval_forward,
        ema_eval_forward=ema_eval_forward,
        precision=precision,
        compiled=training.compile,
        frozen=frozen,
        body=parts.body if parts is not None and settings.model.freeze_epochs else (),
        augment=build_augment(settings, classes, world),
        loss=training.loss,
    )


def compile_static(module: nn.Module) -> nn.Module:
    """`torch.compile` that makes a new graph for a new shape instead of a dynamic one."""
    return cast(nn.Module, torch.compile(module, dynamic=False))


@cache
def say_how_compiled(compiled: bool) -> None:
    """After the first step, once a process, where it is not what `training.compile` promises: one whole graph."""
    breaks = counters["graph_break"]
    if not compiled:
        return
    if counters["stats"]["unique_graphs"] == 0:
        said = "the network is not compiled and trains as without; does the environment disable torch.compile?"
    elif breaks:
        reason = next(iter(breaks)).splitlines()[0]
        said = f"the network is compiled in pieces ({reason}); TORCH_LOGS=graph_breaks names the places"
    else:
        return
    print(f"training.compile: {said}", file=sys.stderr, flush=True)


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far."""
    return float(torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0))


def train_step(
    learner: Learner,
    images: Tensor,
    labels: Tensor,
    lr: float,
    label_smoothing: float,
    norms: Norms | None = None,
    waiting: Sequence[nn.Parameter] = (),
) -> Tensor:
    """One step of the optimizer on one batch.

    Args:
        images: (batch, 3, side, side), uint8, channels last, on the device.
        labels: (batch,), int64, `PADDING` where an image does not count; or as `Augment` gives them.
        lr: the schedule's; each parameter group has a factor of its own.
        norms: take this step's.
        waiting: parameters that this step leaves as they are, their momenta too.

    Returns:
        The loss, a scalar on the device, which nobody has waited for.
    """
    for group in learner.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    with torch.autocast(images.device.type, learner.dtype, enabled=learner.dtype != torch.float32):
        with _saying_too_small(images.shape[-1]):
            logits = learner.forward(images)
        loss = objective(logits, labels, label_smoothing, learner.loss)
    learner.scaler.scale(loss).backward()
    for parameter in waiting:
        parameter.grad = None
    if norms is not None:
        norms.before_update(learner.optimizer, learner.scaler)
    learner.scaler.step(learner.optimizer)
    if norms is not None:
        norms.after_update()
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.ema is not None:
        learner.ema.update_parameters(learner.model)
    return loss.detach()


class Tally:
    """What the steps of an epoch add up to. It stays on the device: reading it waits for the device."""

    def __init__(self, before: Trained, steps: int, world: World) -> None:
        # What was there before counts once, not once a process.
        self.before, self.world, self.steps = before, world, steps
        self.loss_before = before.loss_sum * world.size if world.is_main else 0.0
        self.loss_sum = torch.tensor(self.loss_before, dtype=torch.float64, device=world.device)
        # The first step whose loss was not finite; `steps` if there was none.
        self.first_bad = torch.full((), steps, dtype=torch.int64, device=world.device)
        self.skipped = torch.full_like(self.first_bad, before.skipped if world.is_main else 0)

    @torch.no_grad()
    def add(self, step: int, loss: Tensor, labels: Tensor) -> None:
        """One step's loss, a scalar, and its batch's labels (batch,)."""
        self.loss_sum += loss
        self.skipped += (labels == PADDING).sum()
        bad = torch.where(loss.isfinite(), self.steps, step)
        self.first_bad = self.first_bad.minimum(bad)

    def check(self, epoch: int, step: int, weights: nn.Module | None) -> None:
        """Raises NonFiniteLoss, on all processes at once, if a loss was not finite; with `weights`,
        which are about to be saved, also if those are not: a finite loss may have made them so."""
        bad = int(self.first_bad)
        if weights is not None and not is_finite(weights):
            bad = min(bad, step)
        bad = self.world.least(bad)
        if bad < self.steps:
            raise NonFiniteLoss(epoch, bad)

    def describe(self, step: int, lr: float) -> str:
        """The mean loss of this process so far, for the progress line."""
        mean = (float(self.loss_sum) - self.loss_before) / (step + 1 - self.before.steps)
        left_out = f" skipped {count:,}" if (count := int(self.skipped)) else ""
        return f"loss {mean:.3f} lr {lr:.4g}{left_out}"


def train_epoch(
    learner: Learner, loader: TrainLoader, plan: EpochPlan, lr: Lr, before: Trained, watch: Watch
) -> Trained:
    """Make the steps of one epoch that `before` has not made.

    Returns early, after the step in hand, when a signal arrived, a limit is near or a checkpoint is
    due; call it again with what it returned to go on. BatchNorm's running statistics are then made
    equal on all processes.

    Raises:
        NonFiniteLoss: the loss became NaN or infinite, or the weights that were to be saved; on all
            processes at once.
        RunError: the loader failed.
    """
    world = watch.world
    watch.begin()
    if world.any([watch.stop.late])[0]:
        return replace(before, late=True)
    waiting = begin_training(learner, plan.head_alone)
    tally = Tally(before, plan.steps, world)
    rate, waited, compiled, looks = 0.0, loader.waited, compile_seconds(), list(before.norms)
    batches, made = loader.epoch(plan, before.steps), before.steps * plan.batch_size
    what = f"epoch {plan.epoch} {plan.resolution} px"
    with closing(batches), Progress(plan.images, what, "img", world.is_main, made) as progress:
        for step in range(before.steps, plan.steps):
            images, labels = next(batches)
            done = plan.epoch + (step + 0.5) / plan.steps
            rate = learning_rate(lr, plan.epochs, done, plan.batch_size)
            last = step + 1 == plan.steps
            # Gradients and weights are the same on all processes.
            norms = Norms() if world.is_main and watch.will_look(step, last) else None
            images, targets = learner.augment(images, labels, plan.epoch, step)
            learner.augment.seed_network(plan.epoch, step)
            loss = train_step(learner, images, targets, rate, plan.label_smoothing, norms, waiting)
            say_how_compiled(learner.compiled and world.is_main)
            tally.add(step, loss, labels)
            progress.update(plan.batch_size)
            watch.heart.beat("training", plan.epoch, step + 1)

            if watch.vote(step, last):
                tally.check(plan.epoch, step, learner.model if last or watch.leave else None)
                looks += [norms.read(step, loss)] if norms is not None else []
                progress.update(0, tally.describe(step, rate))
                if watch.leave:
                    world.share(learner.model)  # the checkpoint is one process's
                    break
    compiling = compile_seconds() - compiled + (before.compile_seconds or 0.0)
    return Trained(
        steps=step + 1,
        loss_sum=float(world.sum(tally.loss_sum)) / world.size,
        lr=rate,
        seconds=before.seconds + time.perf_counter() - watch.started,
        loader_seconds=before.loader_seconds + loader.waited - waited,
        skipped=int(world.sum(tally.skipped)),
        compile_seconds=compiling if learner.compiled else None,
        signal=(watch.stop.received or signal.SIGTERM) if watch.stopped else None,
        late=watch.late,
        norms=looks,
    )


@contextmanager
def _saying_too_small(side: int) -> Iterator[None]:
    """Raises UsageError in torch's stead where a batch is of one image, and the last stage of one pixel."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"a batch of one image of {side} px for each process leaves BatchNorm one number of each channel and "
            "nothing to compare it with: raise training.batch_size"
        ) from error


def begin_training(learner: Learner, head_alone: bool) -> list[nn.Parameter]:
    """Training mode for all but what rests, whose BatchNorms neither use nor change a batch's statistics.

    Returns the parameters that wait where the head trains alone; frozen ones have no gradients anyway.
    """
    learner.model.train()
    for module in learner.body if head_alone else learner.frozen:
        module.training = False  # not eval(), which would reach the modules within it
    return parameters_of(learner.body) if head_alone else []


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and running statistics are. Waits for the device."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in values]).all())

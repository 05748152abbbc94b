"""One epoch forward."""

import signal
import time
from contextlib import closing
from typing import Any, cast

import torch
import torch._dynamo
import torch._dynamo.utils
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_imnet.config.schedules import EpochPlan, learning_rate, resolutions
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import NonFiniteLoss
from ffcv_imnet.core.log import Epoch
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.loader import PADDING, TrainLoader
from ffcv_imnet.machine.device import choose_precision
from ffcv_imnet.machine.distributed import StopSignal, World
from ffcv_imnet.models import build_model
from ffcv_imnet.train.checkpoint import Learner, Trained
from ffcv_imnet.train.heartbeat import SILENT, Heartbeat
from ffcv_imnet.train.optim import build_average, build_optimizer
from ffcv_imnet.train.validate import Metrics

LOOK_EVERY = 5.0  # seconds between the host's looks at the loss: each waits for the device
AGREE_EVERY = 8  # steps between votes of several processes: all must leave the loop at the same one


def build_learner(settings: Settings, classes: int, world: World) -> Learner:
    """Network, optimizer, loss scaler and average, with fresh weights, on the world's device."""
    training = settings.training
    device = world.device
    torch.backends.cudnn.benchmark = True  # shapes change once a resolution, not once a step
    torch.set_float32_matmul_precision("high")
    model = build_model(settings, classes).to(device).to(memory_format=torch.channels_last)
    ema = build_average(model, training.ema_decay)
    precision = choose_precision(training.precision, device)

    forward: nn.Module = model
    if world.size > 1:
        # Statistics are made equal once an epoch (World.share), not broadcast at every step.
        forward = DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    judge: nn.Module = model
    ema_judge = ema.module if ema is not None else None
    if training.compile:
        # One graph for each resolution, in training and in evaluation: static shapes are faster.
        torch._dynamo.config.recompile_limit = 2 * len(resolutions(settings)) + 6
        forward, judge = compile_static(forward), compile_static(model)
        ema_judge = compile_static(ema_judge) if ema_judge is not None else None
    return Learner(
        model=model,
        optimizer=build_optimizer(model, settings, precision),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        ema=ema,
        forward=forward,
        judge=judge,
        ema_judge=ema_judge,
        precision=precision,
    )


def compile_static(module: nn.Module) -> nn.Module:
    """`torch.compile` that makes a new graph for a new shape instead of a dynamic one."""
    return cast(nn.Module, torch.compile(module, dynamic=False))


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far."""
    return float(torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0))


def train_epoch(
    learner: Learner,
    loader: TrainLoader,
    plan: EpochPlan,
    settings: Settings,
    world: World,
    stop: StopSignal,
    before: Trained,
    heart: Heartbeat = SILENT,
) -> Trained:
    """Make the steps of one epoch that `before` has not made.

    Returns early, after the step in hand, when a signal arrived, a limit is near or a checkpoint is due; call it again
    with what it returned to go on. BatchNorm's running statistics are then made equal on all processes.
    Loss, the first step at which it was not finite and the number of skipped pictures stay on the
    device; the host reads them every `LOOK_EVERY` seconds.

    Raises:
        NonFiniteLoss: the loss became NaN or infinite, or the weights that were to be saved; on all
            processes at once.
        RunError: the loader failed.
    """
    learner.model.train()
    rate, ended, late = 0.0, None, False
    minutes = settings.training.checkpoint_minutes or float("inf")
    summed = before.loss_sum * world.size if world.is_main else 0.0
    loss_sum = torch.tensor(summed, dtype=torch.float64, device=world.device)
    first_bad = torch.full((), plan.steps, dtype=torch.int64, device=world.device)
    skipped = torch.full_like(first_bad, before.skipped if world.is_main else 0)
    waited, compiled = 0.0, compile_seconds()
    started = looked = time.perf_counter()
    what = f"epoch {plan.epoch} {plan.resolution} px"
    batches = loader.epoch(plan, before.steps)
    made = before.steps * plan.batch_size
    with (
        closing(batches),
        Progress(plan.images, what, enabled=world.is_main, initial=made) as progress,
    ):
        for step in range(before.steps, plan.steps):
            asked = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - asked

            done = plan.epoch + (step + 0.5) / plan.steps
            rate = learning_rate(settings, done, plan.batch_size)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate * group["lr_factor"]
            with torch.autocast(
                world.device.type, learner.dtype, enabled=learner.dtype != torch.float32
            ):
                logits = learner.forward(images)
                loss = F.cross_entropy(
                    logits,
                    labels,
                    ignore_index=PADDING,  # damaged pictures, if they are skipped
                    label_smoothing=plan.label_smoothing,
                )
            learner.scaler.scale(loss).backward()
            learner.scaler.step(learner.optimizer)
            learner.scaler.update()
            learner.optimizer.zero_grad(set_to_none=True)
            last = step + 1 == plan.steps
            if learner.ema is not None:
                learner.ema.update_parameters(learner.model)

            with torch.no_grad():
                loss_sum += loss
                skipped += (labels == PADDING).sum()
                first_bad = first_bad.minimum(torch.where(loss.isfinite(), plan.steps, step))
            progress.update(plan.batch_size)
            heart.beat("training", plan.epoch, step + 1)

            if world.size == 1 or last or step % AGREE_EVERY == 0:
                now = time.perf_counter()
                save = now - started > 60 * minutes
                stopped, late, save, look = world.any(
                    [stop.received is not None, stop.late, save, last or now - looked > LOOK_EVERY]
                )
                if look or stopped or late or save:
                    looked = now
                    bad = int(first_bad)  # waits for the device
                    # A finite loss may have left weights that are not: no checkpoint of those.
                    if (last or stopped or late or save) and not is_finite(learner.model):
                        bad = min(bad, step)
                    bad = world.least(bad)
                    if bad < plan.steps:
                        raise NonFiniteLoss(plan.epoch, bad)
                    mean = (float(loss_sum) - summed) / (step + 1 - before.steps)
                    lost = f" skipped {count:,}" if (count := int(skipped)) else ""
                    progress.update(0, f"loss {mean:.3f} lr {rate:.4g}{lost}")
                if stopped or late or save:
                    world.share(learner.model)  # the checkpoint is one process's
                    ended = (stop.received or signal.SIGTERM) if stopped else None
                    break
    compiling = compile_seconds() - compiled + (before.compile_seconds or 0.0)
    return Trained(
        steps=step + 1,
        loss_sum=float(world.sum(loss_sum)) / world.size,
        lr=rate,
        seconds=before.seconds + time.perf_counter() - started,
        loader_seconds=before.loader_seconds + waited,
        skipped=int(world.sum(skipped)),
        compile_seconds=compiling if settings.training.compile else None,
        signal=ended,
        late=late,
    )


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and running statistics are. Waits for the device."""
    values = [value for value in model.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in values]).all())


def epoch_record(
    plan: EpochPlan,
    trained: Trained,
    plain: Metrics,
    ema: Metrics | None,
    **measured: Any,
) -> Epoch:
    """One line of the log. The keywords are those fields of `Epoch` that the caller measures."""
    return Epoch(
        epoch=plan.epoch,
        resolution=plan.resolution,
        batch_size=plan.batch_size,
        lr=trained.lr,
        train_loss=trained.loss_sum / plan.steps,
        val_loss=plain.loss,
        top_1=plain.top_1,
        top_5=plain.top_5,
        tta_top_1=plain.tta_top_1,
        tta_top_5=plain.tta_top_5,
        ema_val_loss=ema.loss if ema else None,
        ema_top_1=ema.top_1 if ema else None,
        ema_top_5=ema.top_5 if ema else None,
        ema_tta_top_1=ema.tta_top_1 if ema else None,
        ema_tta_top_5=ema.tta_top_5 if ema else None,
        images_per_second=plan.images / trained.seconds,
        train_seconds=trained.seconds,
        loader_seconds=trained.loader_seconds,
        compile_seconds=trained.compile_seconds,
        **measured,
    )

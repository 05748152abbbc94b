"""What torch raises when another process or the accelerator's memory is lost, as one sentence."""

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ffcv_imnet.config.schedules import EpochPlan
from ffcv_imnet.core.errors import RunError
from ffcv_imnet.machine.device import peak_memory, reset_peak_memory, room
from ffcv_imnet.machine.distributed import World, together
from ffcv_imnet.train.checkpoint import Learner

# What the driver, NCCL, Triton, cuDNN and cuBLAS say of a full memory, as RuntimeErrors of other kinds.
FULL = (
    *("out of memory", "unable to find an engine", "CUDNN_STATUS_ALLOC_FAILED"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
)
SPARE = 0.1  # of the memory: what the caching allocator loses between blocks of many sizes


@contextmanager
def explained(
    learner: Learner, plan: EpochPlan, world: World, val_batch: int, timeout_seconds: float
) -> Iterator[None]:
    """Around an epoch's training and validation. `val_batch` is validation.batch_size.

    Raises:
        RunError: in place of torch's error for a full memory, and for a process that died or was
            silent for `distributed.timeout_seconds`.
    """
    doing = f"in epoch {plan.epoch} (--resume auto goes on from the last checkpoint)"
    with together(world, timeout_seconds, doing):
        try:
            yield
        except (
            RuntimeError
        ) as error:  # before `together`, for which NCCL's own is a process that was lost
            full = isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in FULL)
            if not full:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the batch and its activations
            raise RunError(_out_of_memory(learner, plan, world, val_batch)) from None


def _out_of_memory(learner: Learner, plan: EpochPlan, world: World, val_batch: int) -> str:
    what = f"{world.device_name()} is out of memory"
    if not learner.model.training:
        return (
            f"{what} in the validation after epoch {plan.epoch}: lower validation.batch_size {val_batch}, "
            f"which changes no result, and --resume auto goes on"
        )
    local, tuning = plan.batch_size // world.size, torch.backends.cudnn.benchmark
    # For a new shape cuDNN would try kernels with whatever memory is free.
    torch.backends.cudnn.benchmark = False
    try:
        fits = fitting_batch(
            lambda batch: _peak(learner, batch, plan, world), room(world.device), local
        )
    except RuntimeError:  # not even the small ones fitted
        fits = None
    finally:
        torch.backends.cudnn.benchmark = tuning
    advice = f"{fits * world.size} would fit" if fits else "take a much smaller one"
    return (
        f"{what} in epoch {plan.epoch} at {plan.resolution} px with a batch of {plan.batch_size}: "
        f"{advice} (--training.batch_size, or the stage's batch_size; another logging.folder)"
    )


def fitting_batch(peak: Callable[[int], int], room: int, tried: int) -> int | None:
    """The largest batch of one process that fits, a multiple of 8 where it is larger than that.

    Memory is a constant (weights, momentum) and so much an image. How far the step that failed had
    come nobody knows, so both are measured on two small batches.

    Args:
        peak: most bytes allocated during a step with a batch of so many.
        room: bytes that this process can have.
        tried: the batch that did not fit.
    """
    small = tried // 8
    if small < 2:
        return None
    first, second = peak(small), peak(2 * small)
    each = max(1.0, (second - first) / small)
    fits = min(tried - 1, small + math.floor((room * (1 - SPARE) - first) / each))
    return (fits // 8 * 8 if fits > 8 else fits) if fits > 0 else None


def _peak(learner: Learner, batch: int, plan: EpochPlan, world: World) -> int:
    """Most bytes during forward and backward. Not compiled, which would take minutes for a new shape and
    need less memory; and without the other processes, whom nobody told to take part."""
    side = plan.resolution
    learner.optimizer.zero_grad(set_to_none=True)
    reset_peak_memory(world.device)
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=world.device)
    half = learner.dtype != torch.float32
    with torch.autocast(world.device.type, learner.dtype, enabled=half):
        loss = learner.model(images.contiguous(memory_format=torch.channels_last)).float().sum()
    # Not backward(): after one that memory ended, DistributedDataParallel still waits for each parameter's
    # gradient and would send it to the others. This puts none into a parameter.
    weights = [p for p in learner.model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, weights, allow_unused=True)
    return peak_memory(world.device) or 0

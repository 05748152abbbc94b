"""The world as torchrun describes it: one process a device, or a single process without torchrun."""

import math
import os
import signal
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ffcv_imnet.core.errors import RunError, reason_of
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine.host import usable_cores


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, `local_size` of them on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, in place. Any shape; on `device`."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Each flag or-ed over all processes, by way of the host: the device is not waited for."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)  # on the CPU: gloo
        dist.all_reduce(votes)
        return [bool(vote) for vote in votes.tolist()]

    def least(self, value: int) -> int:
        """The smallest of all processes' values, by way of the host."""
        if self.size == 1:
            return value
        votes = torch.tensor(value)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return int(votes)

    def agree(self, what: str) -> bool:
        """Whether all processes say the same text."""
        number = zlib.crc32(what.encode())
        return self.least(number) == number == -self.least(-number)

    def share(self, model: nn.Module) -> None:
        """Make BatchNorm's running statistics equal on all processes: they become their mean."""
        if self.size > 1:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for buffer in module.buffers(recurse=False):
                        if buffer.is_floating_point():  # not the number of batches seen
                            dist.all_reduce(buffer)
                            buffer /= self.size

    def device_name(self) -> str:
        """The accelerator's or the processor's name."""
        return devices.name(self.device)

    def peak_memory(self) -> int | None:
        """Most bytes ever allocated on the accelerator; None on a CPU."""
        return devices.peak_memory(self.device)


def describe_world(device: str = "auto") -> World:
    """The world from torchrun's environment variables; nothing is connected yet.

    Args:
        device: as `training.device`.

    Raises:
        UsageError: see `device.choose`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=local_rank,
        local_size=local_size,
        device=devices.choose(device, local_rank, local_size),
    )


def connect(world: World, timeout_seconds: float = 600.0) -> None:
    """Join the other processes: gloo for the host, NCCL for GPUs. A world of one stays alone.

    torch gets this process's share of the cores: importing ffcv leaves it with one thread, and
    torchrun asks for one too.

    Raises:
        RunError: the others did not come in time.
    """
    torch.set_num_threads(max(1, usable_cores() // world.local_size))
    devices.make_current(world.device)
    if world.size > 1:
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        except RuntimeError as error:  # gloo has no class of its own
            raise RunError(
                f"the {world.size} processes of this run did not find each other within "
                f"distributed.timeout_seconds {timeout_seconds:g} ({reason_of(error)}): were all of "
                f"them started, and can this machine reach the first one's?"
            ) from error


def disconnect(world: World) -> None:
    """Leave the other processes."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


class Interrupted(Exception):
    """Asked to end: `signal` is the signal's number, or None at a limit of hours or dollars."""

    def __init__(self, number: int | None) -> None:
        super().__init__(number)
        self.signal = number


class StopSignal:
    """Notes SIGTERM and Ctrl-C so that the loop can end after the step in hand, as it does at `deadline`.

    A second signal acts at once, for whoever cannot wait.
    """

    def __init__(self, listen: bool = True) -> None:
        self.received: int | None = None
        self.deadline = math.inf  # of time.perf_counter()
        for number in (signal.SIGTERM, signal.SIGINT) if listen else ():
            signal.signal(number, self._note)

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() >= self.deadline

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

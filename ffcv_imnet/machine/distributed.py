"""The world as torchrun describes it: one process a device, or a single process without torchrun."""

import math
import os
import re
import signal
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ffcv_imnet.core.errors import RunError, UsageError, reason_of
from ffcv_imnet.core.signals import hear
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine.host import usable_cores

SAME_REQUEST = 10.0  # seconds; a checkpoint takes a few
TIMEOUT = 600.0  # seconds that the tools wait for another process; training has a setting
TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"


@dataclass(frozen=True)
class Ranks:
    """A process's place among `size` processes, `local_size` of them on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True)
class World(Ranks):
    """This process's place, and its device."""

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
        smallest, largest = self.least(number), -self.least(-number)  # both, on every process
        return smallest == largest

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


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """This process's place from torchrun's variables; alone where there are none.

    A world of one may leave out the local ones: clusters set RANK and WORLD_SIZE for single jobs too.

    Raises:
        UsageError: they are there by halves, are no numbers, or contradict each other.
    """
    there = [name for name in TORCHRUN if name in environment]
    if not there:
        return Ranks(0, 1, 0, 1)

    def wrong(what: str) -> UsageError:
        return UsageError(
            f"the environment has {what}: torchrun sets {', '.join(TORCHRUN)} together; start with "
            f"torchrun, or alone with `env -u {' -u '.join(there)} python ...`"
        )

    values = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name in there:
        if not re.fullmatch(r"[0-9]{1,9}", environment[name]):
            raise wrong(f"{name}={environment[name][:40]!r}, which is no number")
        values[name] = int(environment[name])
    if values.get("WORLD_SIZE") == 0 or values["LOCAL_WORLD_SIZE"] == 0:
        raise wrong("a world of 0 processes")
    several = values.get("WORLD_SIZE") != 1
    needed = [*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"] if several else ["RANK"]
    if missing := [name for name in needed if not environment.get(name)]:
        raise wrong(f"{there[0]} but no {missing[0]}")
    port = environment.get("MASTER_PORT", "0") if several else "0"
    if not (re.fullmatch(r"[0-9]{1,5}", port) and int(port) < 1 << 16):
        raise wrong(f"MASTER_PORT={port[:40]!r}, which is no port")
    ranks = Ranks(*(values[name] for name in TORCHRUN))
    if ranks.rank >= ranks.size:
        raise wrong(f"RANK={ranks.rank} in a world of {ranks.size}")
    if ranks.local_rank >= ranks.local_size:
        raise wrong(f"LOCAL_RANK={ranks.local_rank} of {ranks.local_size} on this machine")
    if ranks.local_size > ranks.size:
        raise wrong(f"LOCAL_WORLD_SIZE={ranks.local_size} in a world of {ranks.size}")
    return ranks


def describe_world(device: str = "auto") -> World:
    """The world from torchrun's environment variables; nothing is connected yet.

    Args:
        device: as `training.device`.

    Raises:
        UsageError: see `read_ranks` and `device.choose`.
    """
    ranks = read_ranks()
    chosen = devices.choose(device, ranks.local_rank, ranks.local_size)
    return World(**vars(ranks), device=chosen)


def connect(world: World, timeout_seconds: float = TIMEOUT) -> None:
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


@contextmanager
def together(world: World, timeout_seconds: float, doing: str) -> Iterator[None]:
    """Around whatever the processes do with each other.

    Args:
        doing: when, in words.

    Raises:
        RunError: in place of torch's error, when one of the others died or was silent for so long.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception of its own; its messages begin with its file's name.
        if world.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RunError(
            f"process {world.rank} lost the others {doing}: one of them died, or was "
            f"silent for distributed.timeout_seconds {timeout_seconds:g} ({reason_of(error)})"
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
    """Notes a request to end so that the loop can end after the step in hand, as it does at `deadline`.

    A scheduler signals all processes of a job and torchrun its workers once more: for `SAME_REQUEST`
    seconds every further signal is the same request. Later ones act at once, and so does a second
    Ctrl-C, for whoever cannot wait; under torchrun, which forwards that too, only after the same time.
    """

    def __init__(self, listen: bool = True) -> None:
        self.received: int | None = None
        self.first = math.inf  # time.monotonic() of it
        self.deadline = math.inf  # of time.perf_counter()
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        if listen:
            hear(self._note)
            signal.signal(signal.SIGINT, self._note)

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() >= self.deadline

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self.received is None:
            self.received, self.first = number, time.monotonic()
            return
        impatient = number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ
        if not impatient and time.monotonic() - self.first <= SAME_REQUEST:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def _leave_terminal(self) -> None:
        """What is said from here on goes nowhere: writing to a terminal that is gone is an error."""
        for stream in self.terminals:
            if not os.isatty(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

"""What asks a command to end: how often a request counts, who hears it, and that processes agree."""

import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ffcv_imnet.core.progress import Progress
from ffcv_imnet.core.signals import exit_when_asked
from ffcv_imnet.data.loader import exact_share, pad
from ffcv_imnet.machine.distributed import SAME_REQUEST, Interrupted, StopSignal, World
from ffcv_imnet.train.validate import forward

CPU = torch.device("cpu")


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """time.monotonic() as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_repeat_is_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signals a worker, and torchrun once more: the first restored the default handler."""
    now = clock(monkeypatch)
    stop = StopSignal()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)  # the default of each would end this process
        now[0] += SAME_REQUEST / 5
    assert stop.received == signal.SIGTERM
    acted: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", acted.append)
    now[0] += 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert acted == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_every_request_is_heard(number: signal.Signals) -> None:
    stop = StopSignal()
    os.kill(os.getpid(), number)
    assert stop.received == number


def test_a_second_ctrl_c_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun forwards the first
    now = clock(monkeypatch)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT
    now[0] += SAME_REQUEST + 1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    exit_when_asked()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received is None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM])
def test_tools_end_in_their_orderly_way(number: signal.Signals) -> None:
    restore = exit_when_asked()
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), number)
        time.sleep(0)
    assert end.value.code == 128 + number
    restore()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other end is closed: writing to it is an error, which must not cost the checkpoint."""
    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(terminal, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        progress = Progress(1000, "epoch 0")
        assert progress.bar is not None
        stop = StopSignal()
        stop.terminals = [terminal]
        os.close(ours)
        progress.bar.mininterval = 0
        with progress:
            for _ in range(100):
                progress.update(1)
            assert progress.done == 100
        with pytest.raises(OSError, match="Errno 5"):
            print("epoch 0", file=stream)
        os.kill(os.getpid(), signal.SIGHUP)
        print("stopped by SIGHUP", file=stream)
    assert stop.received == signal.SIGHUP


# ---- validation ---------------------------------------------------------------------------------


class Share:
    """Images of one process, in padded batches, as `ValLoader` gives them."""

    def __init__(self, samples: int, batch: int, world: World) -> None:
        self.samples = samples
        self.order, self.local_batch = exact_share(samples, batch, world)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.order), self.local_batch):
            count = len(self.order[start : start + self.local_batch])
            yield pad(torch.zeros(count, 3, 2, 2), torch.zeros(count).long(), self.local_batch)


def voted(world: World, samples: int, batch: int) -> int:
    """How often this process votes in a validation that nobody stops; it makes all its batches."""
    loader, votes = Share(samples, batch, world), [0]

    def any_of(_: World, flags: list[bool]) -> list[bool]:
        votes[0] += 1
        return flags

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "any", any_of)
        made = list(
            forward(nn.Flatten(), loader, world, torch.float32, tta=False, what="", stop=StopSignal(False))  # type: ignore[arg-type]
        )  # fmt: skip
    assert len(made) == -(-len(loader.order) // loader.local_batch)
    return votes[0]


@pytest.mark.parametrize(
    ("samples", "batch"), [(33, 16), (33, 4), (32, 8), (7, 8), (3, 8), (100, 1)]
)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_vote_equally_often_in_validation(samples: int, batch: int, size: int) -> None:
    """Their shares differ by an image: one vote more on one of them would never be answered."""
    votes = {voted(World(rank, size, rank, size, CPU), samples, batch) for rank in range(size)}
    assert len(votes) == 1
    assert votes.pop() >= samples // max(batch, size) - 1


def test_validation_ends_when_another_process_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the validation may take longer than torchrun's 30 s: then all would be killed."""
    monkeypatch.setattr(World, "any", lambda *_: [True])
    world, seen = World(1, 2, 1, 2, CPU), 0
    loader = Share(100, 8, world)
    with pytest.raises(Interrupted) as end:
        for _ in forward(nn.Flatten(), loader, world, torch.float32, tta=False, what="", stop=StopSignal(False)):  # type: ignore[arg-type]  # fmt: skip
            seen += 1
    assert seen == 1 and end.value.signal == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_child_does_not_outlive_who_waits_for_it(number: signal.Signals) -> None:
    """Its parent alone gets the signal, as from a scheduler; training is such a child of `sweep` and `demo`."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = (
        "import sys; from ffcv_imnet.core.signals import exit_when_asked, run_child; exit_when_asked();"
        f"run_child([sys.executable, '-S', '-c', {child!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

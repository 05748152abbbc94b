"""The suite at the size of CI, in one process that imports once, and each fault's own sentence."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train_imagenet
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core import log as records
from ffcv_imnet.core.errors import NonFiniteLoss, RunError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.data.loader import _Epoch
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train import checkpoint, run_dir
from ffcv_imnet.train import failures as faults
from ffcv_imnet.train.checkpoint import Trained
from ffcv_imnet.train.epoch import build_learner
from ffcv_imnet.train.failures import fitting_batch
from ffcv_imnet.train.heartbeat import Heartbeat
from ffcv_imnet.train.run_dir import RunFolder
from tests.conftest import SmallData
from tests.faults import replay
from tests.faults.outside import copy_of
from tests.test_atomic import largest_file
from tests.test_training import run

KINDS = {
    "kill", "tables", "images", "manifest", "checkpoint", "log", "config", "map", "disk", "rank",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(small: SmallData, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """`python -m tests.faults`, which forks its runs."""
    out = tmp_path_factory.mktemp("faults") / "rows.jsonl"
    words = [sys.executable, "-m", "tests.faults", "--json", str(out)]
    words += ["--data", str(small.train.parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert "Traceback" not in done.stderr, done.stderr  # a mistake of its own, not of the runs
    assert out.exists(), done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("kind", sorted(KINDS | {"soak"}))
def test_nothing_is_lost(kind: str, rows: list[dict[str, Any]]) -> None:
    mine = [row for row in rows if row["kind"] == kind]
    assert mine and all(row["well"] for row in mine), mine


# ---- a non-finite loss --------------------------------------------------------------------------------

LOST = {"lr__lr": 1e30, "training__momentum": 0, "training__on_nonfinite_loss": "back"}


def test_a_non_finite_loss_goes_back_at_a_lower_rate(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a millionth each time; interrupted after that and resumed, the rate stays lowered."""
    settings = small.settings(tmp_path / "run", **LOST)
    monkeypatch.setattr(run_dir, "LOWER_BY", 1e-6)
    monkeypatch.setattr(run_dir, "LOWER_TIMES", 5)
    save = RunFolder.save

    def save_then_signal(self: RunFolder, *arguments: Any) -> None:
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save", save_then_signal)
        assert run(settings) == 128 + signal.SIGTERM
    before = [lowered.lr_scale for lowered in read_log(tmp_path / "run").lowered]
    assert run(settings, "auto") == 0
    log = read_log(tmp_path / "run")
    scales = [lowered.lr_scale for lowered in log.lowered]
    assert scales == pytest.approx([1e-6**n for n in range(1, len(scales) + 1)], rel=1e-9)
    assert 3 <= len(before) <= len(scales) and scales[: len(before)] == before
    assert [epoch.epoch for epoch in log.epochs] == [0, 1]
    first, second = (epoch.lr for epoch in log.epochs)
    assert first == pytest.approx(1e30 * before[-1] * 5.5 / 6)  # the last of six steps
    assert second == pytest.approx(1e30 * scales[-1] * 0.5 / 6)


def test_it_goes_back_only_so_often(small: SmallData, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"also at 0.125 .*lowered 3 times"):
        run(small.settings(tmp_path / "run", **LOST))
    log = read_log(tmp_path / "run")
    assert [lowered.lr_scale for lowered in log.lowered] == [0.5, 0.25, 0.125]
    assert log.epochs == []


def test_it_goes_back_behind_a_checkpoint_of_broken_weights(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint after every step, the last is of weights of 1e30, whose next loss is not finite."""
    monkeypatch.setattr(run_dir, "LOWER_BY", 1e-6)
    monkeypatch.setattr(run_dir, "LOWER_TIMES", 9)
    often = {"training__checkpoint_minutes": 1e-9}
    assert run(small.settings(tmp_path / "run", **LOST, **often)) == 0
    log = read_log(tmp_path / "run")
    assert [epoch.epoch for epoch in log.epochs] == [0, 1] and len(log.lowered) < 9
    assert log.lowered[0].back_to_step == 0 and log.lowered[0].step > 0


def test_weights_that_are_not_finite_are_not_saved(small: SmallData, tmp_path: Path) -> None:
    """The loss of the epoch's only step is finite, what it makes of the weights is not."""
    once = {"training__batch_size": 100, "training__epochs": 1, "lr__lr": 1e300}
    with pytest.raises(NonFiniteLoss, match="epoch 0, step 0"):
        run(small.settings(tmp_path / "run", **once))
    assert not (tmp_path / "run" / "last.pt").exists()


# ---- memory -------------------------------------------------------------------------------------


def test_the_batch_that_fits() -> None:
    """100 bytes, and 3 an image: (900 - 100) / 3 = 266, and 264 is a multiple of 8."""
    assert fitting_batch(lambda batch: 100 + 3 * batch, 1000, tried=400) == 264
    assert fitting_batch(lambda batch: 100 + 200 * batch, 1000, tried=400) == 4
    assert fitting_batch(lambda batch: 1000 + batch, 1000, tried=400) is None  # not even one
    assert fitting_batch(lambda batch: 100 + batch, 1000, tried=8) is None  # too small to tell
    assert fitting_batch(lambda batch: 100 + batch, 10**6, tried=64) == 56  # less than what failed


@pytest.mark.parametrize("where", ["train_epoch", "validate"])
def test_a_full_gpu_names_the_batch_that_fits(
    where: str, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(learner: Any, *_: Any) -> Trained:
        learner.model.train(where == "train_epoch")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_imagenet, where, full)
    monkeypatch.setattr(faults, "_peak", lambda learner, batch, plan, world: 100 + 30 * batch)
    monkeypatch.setattr(faults, "room", lambda device: 1000)
    settings = small.settings(tmp_path / "run", training__batch_size=100)
    says = r"batch of 100: 24 would fit" if where == "train_epoch" else "validation.batch_size 16"
    with pytest.raises(RunError, match=says):
        run(settings)


def test_the_advice_for_validation_is_taken_by_resuming(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, calls = train_imagenet.validate, itertools.count()

    def full(learner: Any, *rest: Any) -> Any:
        if next(calls) == 1:
            learner.model.train(False)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return validate(learner, *rest)

    monkeypatch.setattr(train_imagenet, "validate", full)
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"lower validation.batch_size 16.*--resume auto goes on"):
        run(small.settings(folder))
    assert run(small.settings(folder, validation__batch_size=8), "auto") == 0
    assert [epoch.epoch for epoch in read_log(folder).epochs] == [0, 1]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_search_for_it_asks_no_other_process(small: SmallData, tmp_path: Path) -> None:
    """Memory ended within backward: DistributedDataParallel still waits for the rest of the gradients."""
    two = World(0, 2, 0, 2, torch.device("cpu"))
    settings = small.settings(tmp_path)
    learner = build_learner(settings, 10, two)
    sent: list[int] = []

    def send(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.index())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    assert isinstance(learner.forward, DistributedDataParallel)
    learner.forward.register_comm_hook(None, send)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    logits = learner.forward(images)
    logits.grad_fn.register_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        logits.sum().backward()
    faults._peak(learner, 4, plan_run(settings, 100)[0], two)
    assert not sent and all(p.grad is None for p in learner.model.parameters())


# ---- loader, file, log --------------------------------------------------------------------------


def test_a_loader_thread_that_dies_ends_the_run(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise SystemExit  # what ends a thread without a word

    monkeypatch.setattr(_Epoch, "run_pipeline", die)
    with pytest.raises(RunError, match=r"train\.beton: the loader failed: SystemExit"):
        run(small.settings(tmp_path / "run"))


def test_a_file_that_changes_while_it_is_read(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy_of(small, tmp_path / "data")
    save = RunFolder.save

    def save_then_change(self: RunFolder, *arguments: Any) -> None:
        save(self, *arguments)
        with own.train.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")

    monkeypatch.setattr(RunFolder, "save", save_then_change)
    with pytest.raises(RunError, match=r"train\.beton was changed while it was read"):
        run(own.settings(tmp_path / "run"))


def test_sigbus_in_one_sentence() -> None:
    code = (
        "import os, signal; from ffcv_imnet.data.bus_error import explain_bus_error as e\n"
        "e('a.beton', 'b.beton'); os.kill(os.getpid(), signal.SIGBUS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a.beton or b.beton was truncated, or its disk failed")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_names_the_log() -> None:
    with pytest.raises(
        RunError, match=r"/dev/full could not be written \(No space left.*make room"
    ):
        records.append(
            Path("/dev/full"), records.Lowered(epoch=0, step=1, back_to_step=0, lr_scale=0.5)
        )


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    """By the system's reason, which torch's own message hides; room helps only a full disk."""
    with pytest.raises(RunError, match=r"last\.pt .*No such file.*: is its folder still there"):
        checkpoint.save({}, tmp_path / "gone" / "last.pt")

    state = {"weights": torch.zeros(1 << 20)}  # torch says "unexpected pos" of what is refused
    for limit in (1 << 20, 100):
        with (
            largest_file(limit),
            pytest.raises(RunError, match=r"last\.pt .*\(File too large\): raise the limit"),
        ):
            checkpoint.save(state, tmp_path / "last.pt")
    assert not list(tmp_path.iterdir())


# ---- heartbeat ----------------------------------------------------------------------------------


def test_the_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ffcv_imnet.train.heartbeat.time.monotonic", lambda: now[0])
    path = tmp_path / "heartbeat.json"
    heart = Heartbeat(path)
    for step, seconds in ((1, 0.0), (2, 4.9), (3, 5.1)):
        now[0] = 100.0 + seconds
        heart.beat("training", 7, step)
        assert json.loads(path.read_text())["step"] == (1 if step < 3 else 3)
    heart.beat("validating", now=True)
    said = json.loads(path.read_text())
    assert (said["doing"], said["epoch"], said["step"], said["pid"]) == (
        "validating",
        7,
        3,
        os.getpid(),
    )
    Heartbeat(tmp_path / "no/such/folder").beat("training", 0, 1)  # nobody's failure


# ---- power cuts ---------------------------------------------------------------------------------


def test_a_power_cut_loses_nothing_that_was_announced(small: SmallData, tmp_path: Path) -> None:
    """A few dozen prefixes of what `python -m tests.faults.replay` plays a thousand of."""
    settings = small.settings(tmp_path / "run", training__checkpoint_minutes=1e-9)
    events = replay.record(settings)
    assert [event[1] for event in events if event[0] == "announce"] == [0, 1]
    counts = replay.check(events, settings, small, 40)
    assert set(counts) == set(replay.VARIANTS) and sum(counts.values()) == 120
    # The same run on a disk that keeps nothing but what it was made to, and a folder never was.
    unforced = [event for event in events if event[0] != "fsync folder"]
    assert any("LOST" in what for what in replay.check(unforced, settings, small, 40))

"""What only a card can show: `pytest -m gpu`. Each is skipped where torch can use none."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ffcv_imnet.config.parsing import load, to_yaml
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core.errors import RunError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.data.image_loader import ImageLoader
from ffcv_imnet.data.loader import TrainLoader
from ffcv_imnet.machine import device
from ffcv_imnet.machine.device import Copies
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train import checkpoint, failures
from ffcv_imnet.train.epoch import build_learner, train_step
from ffcv_imnet.train.run_dir import RunFolder
from tests.conftest import SmallData
from tests.test_training import run, tensors

CARDS = device.count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CARDS == 0, reason="torch can use no NVIDIA card here"),
]
GPU = torch.device("cuda", 0)
ON_GPU = World(0, 1, 0, 1, GPU)
ON_CPU = World(0, 1, 0, 1, torch.device("cpu"))
LONG = 1_000_000_000  # clock cycles that a kernel sleeps: at 1 to 2 GHz half a second or more
STEP = LONG // 50


def test_a_batch_is_copied_while_the_step_before_it_is_made() -> None:
    copies = Copies(GPU)
    first, second = (torch.full((8, 3, 64, 64), n, dtype=torch.uint8).pin_memory() for n in (1, 2))
    (there,) = copies.start(first)
    copies.wait()
    assert there.unique().tolist() == [1]
    torch.cuda._sleep(LONG)  # the step on the first
    (there,) = copies.start(second)
    copies.wait()
    assert not copies.compute.query(), "the second waited for the step on the first"
    assert there.unique().tolist() == [2]


def test_batches_are_those_of_a_cpu_from_pinned_memory(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is still there when a step comes to it that the host queued long before."""
    pinned: list[bool] = []
    start = Copies.start

    def noted(self: Copies, *batch: Tensor) -> list[Tensor]:
        pinned.extend(t.is_pinned() for t in batch)
        return start(self, *batch)

    monkeypatch.setattr(Copies, "start", noted)
    settings = small.settings(tmp_path)
    plan = plan_run(settings, small.train_samples)[0]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for world in (ON_CPU, ON_GPU):
        kind = world.device.type
        found[kind] = []
        for images, labels in TrainLoader(
            str(small.train), small.train_samples, settings, world
        ).epoch(plan):
            assert images.device == labels.device == world.device
            assert images.is_contiguous(memory_format=torch.channels_last)
            if kind == "cuda":
                torch.cuda._sleep(STEP)
            found[kind].append((images.clone(), labels.clone()))
    assert len(found["cuda"]) == len(found["cpu"]) == 6
    for ours, wanted in zip(found["cuda"], found["cpu"], strict=True):
        for values, reference in zip(ours, wanted, strict=True):
            assert torch.equal(values.cpu(), reference)
    assert len(pinned) == 12 and all(pinned)


def test_a_busy_device_is_no_slow_loader(small: SmallData, tmp_path: Path) -> None:
    """`waited` is the decoder's, not what a copy waits for the step before the last."""
    settings = small.settings(tmp_path)
    plan = plan_run(settings, small.train_samples)[0]
    loader = TrainLoader(str(small.train), small.train_samples, settings, ON_GPU)
    next(batches := loader.epoch(plan))  # compiles
    batches.close()
    before, started = loader.waited, time.perf_counter()
    for _ in loader.epoch(plan):
        torch.cuda._sleep(LONG // 5)
    device.synchronise(GPU)
    assert loader.waited - before < (time.perf_counter() - started) / 2


def test_a_device_without_a_number(small: SmallData) -> None:
    """As torch.device("cuda" if torch.cuda.is_available() else "cpu") is."""
    with ImageLoader(small.train, 16, 32, device=torch.device("cuda")) as loader:
        images, labels = next(iter(loader))
        assert images.device == labels.device == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "soap"])
def test_a_run_in_fp16(optimizer: str, small: SmallData, tmp_path: Path) -> None:
    """Its losses are finite, its peak of memory is in the log, the scale came down to what fits."""
    settings = small.settings(
        tmp_path / "run", training__precision="fp16", training__optimizer=optimizer,
        training__ema_decay=0.9, validation__lr_tta=True,
    )  # fmt: skip
    assert run(settings) == 0
    log = read_log(tmp_path / "run")
    assert log.headers[0].precision == "fp16"
    for epoch in log.epochs:
        assert math.isfinite(epoch.train_loss) and math.isfinite(epoch.val_loss)
        assert epoch.ema_val_loss is not None and math.isfinite(epoch.ema_val_loss)
        assert epoch.peak_memory_bytes is not None
        assert 16 * 3 * 32 * 32 < epoch.peak_memory_bytes < torch.cuda.mem_get_info(GPU)[1]
    assert len(log.epochs) == 2
    state = checkpoint.load(tmp_path / "run/last.pt")
    assert 0 < state["scaler"]["scale"] <= 65536
    assert all(t.isfinite().all() for t in tensors(state["model"]))


def test_out_of_memory_names_a_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card made small: what fills a large one has more elements than some kernels can count."""
    free, total = torch.cuda.mem_get_info(GPU)
    assert 0 < device.room(GPU) <= total
    limit = 4 << 30
    assert free > limit, "the card is in use"
    settings = load(model__arch="resnet18", training__precision="fp32")
    learner = build_learner(settings, 1000, ON_GPU)
    learner.model.train()
    batch = limit // (12 << 20)  # at 256 px an image needs twice that and more
    plan = replace(plan_run(settings, 1_281_167)[0], resolution=256, batch_size=batch)

    def step(size: int) -> None:
        images = torch.zeros(size, 3, 256, 256, dtype=torch.uint8, device=GPU)
        labels = torch.zeros(size, dtype=torch.int64, device=GPU)
        images = images.contiguous(memory_format=torch.channels_last)
        train_step(learner, images, labels, 0.1, 0.1)
        device.synchronise(GPU)

    monkeypatch.setattr(failures, "room", lambda _: limit)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total, GPU)
    try:
        with (
            pytest.raises(RunError, match="would fit") as raised,
            failures.explained(learner, plan, ON_GPU, 16, 600.0),
        ):
            step(batch)
        found = re.search(r"(\d+) would fit", str(raised.value))
        assert found is not None and batch // 8 < int(found[1]) < batch
        step(int(found[1]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def weights_of(folder: Path) -> dict[str, Tensor]:
    model = checkpoint.load(folder / "last.pt")["model"]
    return {name: value for name, value in model.items() if value.is_floating_point()}


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "soap"])
def test_resumed_equals_never_stopped(
    optimizer: str, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first of two epochs; to rounding, as kernels add up in any order."""
    # SOAP divides by the root of what a direction's gradient was: where that is zero, rounding is all there is.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    one, other = (
        small.settings(tmp_path / name, training__optimizer=optimizer) for name in ("one", "other")
    )
    assert run(one) == 0
    save = RunFolder.save

    def save_then_signal(self: RunFolder, *arguments: Any) -> None:
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save", save_then_signal)
        assert run(other) == 128 + signal.SIGTERM
    assert run(other, "auto") == 0
    log = read_log(tmp_path / "other")
    assert len(log.headers) == 2 and len(log.epochs) == 2
    wanted = weights_of(tmp_path / "one")
    for name, value in weights_of(tmp_path / "other").items():
        torch.testing.assert_close(value, wanted[name], rtol=0.02, atol=0.005, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "soap"])
def test_compiled_equals_eager(optimizer: str, small: SmallData, tmp_path: Path) -> None:
    """By Inductor and Triton, as in the ImageNet recipes."""
    logs = {}
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        settings = small.settings(folder, training__compile=compiled, training__optimizer=optimizer)
        torch._dynamo.reset()  # the graphs of the optimizer before fit this one's network
        assert run(settings) == 0
        logs[compiled] = read_log(folder).epochs
    assert len(logs[True]) == len(logs[False]) == 2
    for ours, wanted in zip(logs[True], logs[False], strict=True):
        assert ours.train_loss == pytest.approx(wanted.train_loss, rel=0.02)
        assert ours.val_loss == pytest.approx(wanted.val_loss, rel=0.02)
    assert logs[True][0].compile_seconds and logs[False][0].compile_seconds is None


@pytest.mark.skipif(CARDS < 2, reason="needs two cards")
def test_two_processes_by_nccl(small: SmallData, tmp_path: Path) -> None:
    """They finish, and count each validation image once."""
    settings = small.settings(tmp_path / "run", training__optimizer="muon")
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ["-m", "tests.networks", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(
        [sys.executable, *torchrun, *script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run")
    assert log.headers[0].world_size == 2 and len(log.epochs) == 2
    assert all(math.isfinite(epoch.train_loss) for epoch in log.epochs)
    hits = [epoch.top_1 * small.val_samples for epoch in log.epochs]
    assert hits == pytest.approx([round(count) for count in hits])

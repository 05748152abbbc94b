"""Whole runs: the log, resuming, stopping, and what a user may do wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import train_imagenet
from ffcv_imnet.config.parsing import load, to_yaml
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.atomic import link
from ffcv_imnet.core.errors import RunError, UsageError, run_main
from ffcv_imnet.core.log import Epoch, Log, read_log
from ffcv_imnet.data.beton import Manifest, manifest_path
from ffcv_imnet.data.loader import epoch_order
from ffcv_imnet.machine.device import choose_precision
from ffcv_imnet.machine.distributed import Interrupted, World
from ffcv_imnet.train import checkpoint, run_dir
from ffcv_imnet.train.checkpoint import Trained
from ffcv_imnet.train.norms import QUANTITIES
from ffcv_imnet.train.run_dir import RunFolder, open_run
from tests.conftest import SmallData
from tests.test_data import damage

TIMED = {
    "images_per_second",
    "train_seconds",
    "loader_seconds",
    "loader_start_seconds",
    "val_seconds",
    "elapsed_seconds",
    "norms",  # which steps are measured
}


def run(settings: Settings, resume: str | None = None) -> int:
    return train_imagenet.train(settings, resume, time.perf_counter())


def results(log: Log) -> list[dict[str, object]]:
    """What must not depend on the clock."""
    return [{k: v for k, v in vars(epoch).items() if k not in TIMED} for epoch in log.epochs]


def tensors(value: object) -> Iterator[torch.Tensor]:
    """All tensors of a checkpoint, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)


def same_weights(a: Path, b: Path) -> bool:
    pairs = zip(tensors(checkpoint.load(a)), tensors(checkpoint.load(b)), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


FULL = {
    "training__epochs": 3,
    "training__ema_decay": 0.9,
    "validation__lr_tta": True,
    "training__nesterov": True,
    "model__zero_gamma": True,
    "resolution__max_res": 64,
    "resolution__start_ramp": 1,
    "resolution__end_ramp": 2,
    "training__stop_at": 0.0001,
}


@pytest.fixture(scope="module")
def whole(small: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs with everything on, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(small.settings(folder, **FULL)) == 0
    return folder


def test_the_run_folder(whole: Path, small: SmallData) -> None:
    names = {path.name for path in whole.iterdir()}
    files = {"log.jsonl", "config.yaml", "classes.txt", "last.pt", "previous.pt", "best.pt"}
    files.add("heartbeat.json")
    assert names == files
    assert load(whole / "config.yaml") == small.settings(whole, **FULL)
    assert len((whole / "classes.txt").read_text().splitlines()) == 10


def test_the_log(whole: Path) -> None:
    log = read_log(whole)
    (header,) = log.headers
    assert header.settings["training"]["epochs"] == 3
    assert header.manifests["val"]["samples"] == 33
    assert str(header.manifests["train"]["content_checksum"]).startswith("sha256:")
    assert header.versions["torch"] == torch.__version__.split("+")[0]
    assert [epoch.resolution for epoch in log.epochs] == [32, 32, 64]
    for epoch in log.epochs:
        for name in ("top_1", "top_5", "ema_top_1", "tta_top_1", "ema_tta_top_5"):
            assert 0 <= getattr(epoch, name) <= 1
            assert round(getattr(epoch, name) * 33, 6).is_integer()  # of 33 images
        assert epoch.top_1 <= epoch.top_5
        assert 0 < epoch.loader_seconds <= epoch.train_seconds <= epoch.elapsed_seconds
    assert log.summary is not None and log.summary.epochs == 3
    best = max(max(e.top_1, e.ema_top_1 or 0) for e in log.epochs)
    assert log.summary.best_top_1 == best
    reached = next(e for e in log.epochs if max(e.top_1, e.ema_top_1 or 0) >= 0.0001)
    assert log.summary.reached is not None and log.summary.reached.epoch == reached.epoch
    assert "null" not in (whole / "log.jsonl").read_text()
    for epoch in log.epochs:  # 100 images: six steps of 16
        assert epoch.norms is not None and epoch.norms[-1]["step"] == 5
        kinds = {f"{g}_{what}" for g in ("sgd", "sgd_1d") for what in QUANTITIES}
        assert epoch.norms[-1].keys() == {"step", "loss"} | kinds


def test_best_is_the_best_epoch(whole: Path) -> None:
    summary = read_log(whole).summary
    assert summary is not None
    kept = checkpoint.load(whole / "best.pt")["run"]["records"]
    assert sum(record["type"] == "epoch" for record in kept) == summary.best_epoch + 1


def test_resumed_equals_never_stopped(
    whole: Path, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by SIGTERM within the second epoch, truncated in its log, resumed: bit for bit."""
    save = RunFolder.save

    def save_then_signal(self: RunFolder, *arguments: Any) -> None:
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    settings = small.settings(tmp_path / "run", **FULL)
    monkeypatch.setattr(RunFolder, "save", save_then_signal)
    assert run(settings) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert len(read_log(tmp_path / "run").epochs) == 1
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"type": "epoch", "epo')  # as a kill in mid-write would leave it
    assert run(settings, "auto") == 0
    log = read_log(tmp_path / "run")
    assert [(h.first_epoch, h.first_step) for h in log.headers] == [(0, 0), (1, 1)]
    assert results(log) == results(read_log(whole))
    assert same_weights(tmp_path / "run/last.pt", whole / "last.pt")
    elapsed = [epoch.elapsed_seconds for epoch in log.epochs]
    assert elapsed == sorted(elapsed)


def test_what_is_drawn_on_the_device_is_drawn_again_by_a_resumed_run(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MixUp or CutMix, RandAugment, stochastic depth and binary cross-entropy: bit for bit."""
    options = {
        "model__arch": "tiny_residual",
        "model__stochastic_depth": 0.3,
        "augmentation__mixup": 0.2,
        "augmentation__cutmix": 1.0,
        "augmentation__randaugment": 9,
        "training__loss": "bce",
    }
    whole = small.settings(tmp_path / "whole", **options)
    assert run(whole) == 0
    save = RunFolder.save

    def save_then_signal(self: RunFolder, *arguments: Any) -> None:
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    stopped = small.settings(tmp_path / "stopped", **options)
    monkeypatch.setattr(RunFolder, "save", save_then_signal)
    assert run(stopped) == 128 + signal.SIGTERM
    monkeypatch.undo()
    torch.manual_seed(12345)  # a new process has another generator's state
    assert run(stopped, "auto") == 0
    log = read_log(tmp_path / "stopped")
    assert [(h.first_epoch, h.first_step) for h in log.headers] == [(0, 0), (1, 1)]
    assert results(log) == results(read_log(tmp_path / "whole"))
    assert same_weights(tmp_path / "stopped/last.pt", tmp_path / "whole/last.pt")


def test_checkpoints_at_every_step_change_nothing(
    whole: Path, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    save = RunFolder._save

    def counted(self: RunFolder, learner: checkpoint.Learner, seconds: float) -> None:
        steps.append(self.trained.steps)
        save(self, learner, seconds)

    monkeypatch.setattr(RunFolder, "_save", counted)
    settings = small.settings(tmp_path / "run", **FULL, training__checkpoint_minutes=1e-9)
    assert run(settings) == 0
    assert steps == [1, 2, 3, 4, 5, 0] * 3  # of six; 0: after the epoch
    assert results(read_log(tmp_path / "run")) == results(read_log(whole))
    assert same_weights(tmp_path / "run/last.pt", whole / "last.pt")


def test_stopped_in_validation_trains_nothing_twice(
    whole: Path, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise Interrupted(signal.SIGINT)

    settings = small.settings(tmp_path / "run", **FULL)
    monkeypatch.setattr(train_imagenet, "validate", stopped)
    assert run(settings) == 128 + signal.SIGINT
    monkeypatch.undo()
    trained: list[int] = []
    train_epoch = train_imagenet.train_epoch

    def noted(*arguments: Any) -> Trained:
        trained.append(arguments[2].epoch)
        return train_epoch(*arguments)

    monkeypatch.setattr(train_imagenet, "train_epoch", noted)
    assert run(settings, "auto") == 0
    assert trained == [1, 2]
    assert results(read_log(tmp_path / "run")) == results(read_log(whole))


FOREIGN: dict[str, Callable[[dict[str, Any]], object]] = {
    "has no run": lambda state: state.pop("run"),
    "as its run": lambda state: state.update(run=[1]),
    "has no settings in its run": lambda state: state["run"].pop("settings"),
    "as its settings in its run": lambda state: state["run"].update(settings={"lr": 1}),
    "as its data in its run": lambda state: state["run"].update(data=["train"]),
    "in its settings|as its settings": lambda state: state["run"]["settings"]["lr"].update(
        lr=[[["of lists of lists"]]]
    ),
    "has the unknown field None": lambda state: state["run"]["records"][0].update({None: 1}),
    "in its classes": lambda state: state["run"].update(classes=["a", "a"]),
    "has a record 1 that is none": lambda state: state["run"]["records"].__setitem__(1, "epoch"),
    "as its records in its run": lambda state: state["run"].update(records={"epoch": 1}),
    "has the unknown field 'step' in its trained": lambda state: state["run"].update(
        trained={"step": 1}
    ),
    "as its steps in its trained": lambda state: state["run"].update(trained={"steps": "1"}),
    "as its elapsed_seconds in its run": lambda state: state["run"].update(elapsed_seconds="1"),
    r"project \(format 1\)": lambda state: state.update(format=torch.zeros(3)),
    "weights that are not tensors of real numbers": lambda state: state["model"].update(
        {"conv.weight": torch.zeros(3, dtype=torch.complex64)}
    ),
    "weights that are not tensors": lambda state: state["model"].update({"conv.weight": [1.0]}),
    "it has no weights": lambda state: state.update(model={}),
    "optimizer's state that is none": lambda state: state["optimizer"].update(
        state={0: {"momentum_buffer": torch.zeros(3, dtype=torch.complex64)}}
    ),
    "an optimizer without its groups": lambda state: state.update(optimizer={"state": {}}),
    "whose settings are not plain": lambda state: state["optimizer"]["param_groups"][0].update(
        lr=["fast"]
    ),
    "an optimizer's state that is none": lambda state: state["optimizer"].update(state={0: 1}),
    "as its torch_rng": lambda state: state.update(torch_rng=[1, 2]),
}


def test_what_is_no_checkpoint_of_this_project_gives_way_to_the_one_before(
    whole: Path, small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sound files of torch.save, whose content is another program's."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = small.settings(folder, **FULL)
    train, val = (Manifest.load(manifest_path(path)) for path in (small.train, small.val))

    def opened(settings: Settings) -> RunFolder:
        world = World(0, 1, 0, 1, torch.device("cpu"))
        return open_run(settings, "auto", train, val, world, time.perf_counter())

    epochs = len(opened(small.settings(whole, **FULL)).epochs)
    for says, spoil in FOREIGN.items():
        state = checkpoint.load(whole / "last.pt")
        spoil(state)
        torch.save(state, folder / "last.pt")
        with pytest.raises(RunError, match=f"last.pt: not a checkpoint of this .*{says}"):
            opened(settings)
    shutil.copy(whole / "previous.pt", folder)
    for other in ([1, 2], {"format": 1}, torch.zeros(3)):
        torch.save(other, folder / "last.pt")
        found = opened(settings)
        assert found.damaged and len(found.epochs) in (epochs - 1, epochs)
        said = capsys.readouterr().err
        assert "last.pt: not a checkpoint of this project" in said and "previous.pt" in said
    found._write_start()  # killed here, the run still has something to go on from
    found.release()
    assert not (folder / "last.pt").exists()
    again = opened(settings)
    assert len(again.epochs) == len(found.epochs) and again.state is not None


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    whole: Path, small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    last = bytearray((folder / "last.pt").read_bytes())
    last[len(last) // 2] ^= 1
    (folder / "last.pt").write_bytes(last)
    assert run(small.settings(folder, **FULL), "auto") == 0
    said = capsys.readouterr().err
    assert "last.pt is damaged" in said and "checksum" in said and "previous.pt" in said
    assert [header.first_epoch for header in read_log(folder).headers] == [0, 2]
    assert results(read_log(folder)) == results(read_log(whole))
    assert same_weights(folder / "last.pt", whole / "last.pt")
    assert (folder / "damaged.pt").read_bytes() == last


def test_resume_from_a_named_checkpoint(whole: Path, small: SmallData, tmp_path: Path) -> None:
    """From the middle of another run, into a new folder."""
    state = checkpoint.load(whole / "last.pt")
    two_epochs = [r for r in state["run"]["records"] if r.get("epoch", 0) < 2]
    state["run"]["records"] = two_epochs
    checkpoint.save(state, tmp_path / "middle.pt")
    settings = small.settings(tmp_path / "run", **FULL)
    assert run(settings, str(tmp_path / "middle.pt")) == 0
    assert len(read_log(tmp_path / "run").epochs) == 3
    with pytest.raises(UsageError, match="holds another run than --resume"):
        run(settings, str(whole / "last.pt"))


def test_one_image_a_batch_is_too_few_for_a_stage_of_one_pixel(
    small: SmallData, tmp_path: Path
) -> None:
    settings = small.settings(tmp_path / "run", model__arch="resnet18", training__batch_size=1)
    with pytest.raises(UsageError, match=r"one image of \d+ px .*: raise training.batch_size"):
        run(settings)


def test_resume_auto(whole: Path, small: SmallData, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small.settings(whole, **FULL)
    before = (whole / "log.jsonl").read_bytes()
    assert run(settings, "auto") == 0
    assert "finished" in capsys.readouterr().out
    assert (whole / "log.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match="holds a run already"):
        run(settings)
    with pytest.raises(UsageError, match=r"other settings \(lr.lr 0.05 -> 0.06\)"):
        run(small.settings(whole, **FULL, lr__lr=0.06), "auto")


@pytest.mark.parametrize(("lost", "epochs"), [("link", 1), ("link", 2), ("append", 1)])
def test_a_disk_that_was_full_after_the_checkpoint(
    lost: str, epochs: int, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """best.pt and the log's line come after it: a resume makes both, also where nothing is left to train."""
    settings = small.settings(tmp_path / "run", training__epochs=epochs)

    def full(first: Path, second: Path | object) -> None:
        if lost == "append" or (isinstance(second, Path) and second.name == "best.pt"):
            raise RunError("make room")
        link(first, second)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(RunError, match="make room"):
        patched.setattr(run_dir.log if lost == "append" else run_dir, lost, full)
        run(settings)
    assert run(settings, "auto") == 0
    log = read_log(tmp_path / "run")
    assert [epoch.epoch for epoch in log.epochs] == list(range(epochs))
    assert log.summary is not None and log.summary.epochs == epochs
    saved = checkpoint.load(tmp_path / "run/best.pt")["run"]["records"]
    assert sum(record["type"] == "epoch" for record in saved) == log.summary.best_epoch + 1


@pytest.mark.parametrize("best", [0, 1])
def test_resumed_in_a_new_folder_the_best_epoch_comes_along(
    best: int, whole: Path, small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For none of the epochs after it may be as good."""
    state = checkpoint.load(whole / "previous.pt")
    records = state["run"]["records"]
    epochs = [record for record in records if record["type"] == "epoch"]
    assert len(epochs) == 2
    epochs[best]["top_1"] = 0.99
    (tmp_path / "a").mkdir()
    torch.save(state, tmp_path / "a/last.pt")
    if best == 0:
        state["run"]["records"] = records[: records.index(epochs[0]) + 1]
        torch.save(state, tmp_path / "a/best.pt")

    def fail(*_: object) -> None:
        raise RunError("enough")

    monkeypatch.setattr(train_imagenet, "train_epoch", fail)
    with pytest.raises(RunError, match="enough"):
        run(small.settings(tmp_path / "b", **FULL), str(tmp_path / "a/last.pt"))
    kept = checkpoint.load(tmp_path / "b/best.pt")["run"]["records"]
    assert sum(record["type"] == "epoch" for record in kept) == best + 1


def test_a_finished_run_makes_no_new_folder(
    whole: Path, small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small.settings(tmp_path / "new", **FULL), str(whole / "last.pt")) == 0
    assert f"{whole / 'last.pt'}: finished after 3 epochs" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_resume_on_other_data(whole: Path, small: SmallData, tmp_path: Path) -> None:
    shutil.copy(small.val, tmp_path / "val.beton")
    text = json.loads(small.val.with_suffix(".json").read_text())
    text["content_checksum"] = "sha256:" + "0" * 64
    (tmp_path / "val.json").write_text(json.dumps(text))
    settings = small.settings(whole, **FULL, data__val_dataset=tmp_path / "val.beton")
    with pytest.raises(UsageError, match="other data"):
        run(settings, "auto")


def test_damaged_checkpoint(whole: Path, small: SmallData, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes((whole / "last.pt").read_bytes()[:100_000])
    settings = small.settings(tmp_path / "run", **FULL)
    with pytest.raises(RunError, match=r"bad\.pt is damaged"):
        run(settings, str(bad))
    with pytest.raises(UsageError, match="no such file; --resume auto goes on with the run"):
        run(settings, "yes")
    last, best = (tmp_path / "run" / name for name in ("last.pt", "best.pt"))
    last.parent.mkdir()
    link(bad, last)
    link(last, best)  # a link: as damaged as the other
    with pytest.raises(
        RunError,
        match=r"last\.pt is damaged, truncated or no file of weights \(.*\); start again in another",
    ):
        run(settings, "auto")
    best.unlink()
    link(whole / "best.pt", best)
    with pytest.raises(RunError, match=r"--resume .*best\.pt goes on from the best epoch"):
        run(settings, "auto")


def test_a_non_finite_loss_ends_the_run_and_keeps_the_checkpoint(
    small: SmallData, tmp_path: Path
) -> None:
    settings = small.settings(tmp_path / "run", lr__lr=1e30, training__momentum=0)
    with pytest.raises(RunError, match=r"became NaN or infinite in epoch 0, step \d+"):
        run(settings)
    assert not (tmp_path / "run/last.pt").exists()
    assert read_log(tmp_path / "run").epochs == []


def test_the_target_can_end_the_run(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(
        tmp_path / "run", training__stop_at=1e-6, training__stop_when_reached=True, lr__lr=1e-6
    )
    assert run(settings) == 0
    log = read_log(tmp_path / "run")
    assert len(log.epochs) == 1 and log.summary is not None and log.summary.reached is not None
    assert run(settings, "auto") == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision(precision: str, small: SmallData, tmp_path: Path) -> None:
    """The one code path with autocast on, and with loss scaling for fp16."""
    settings = small.settings(tmp_path / "run", training__precision=precision, training__epochs=1)
    assert run(settings) == 0
    log = read_log(tmp_path / "run")
    assert log.headers[0].precision == precision
    scaler = checkpoint.load(tmp_path / "run/last.pt")["scaler"]
    assert ("scale" in scaler) == (precision == "fp16")


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, best in (
        ((6, 1), "fp32"),
        ((7, 5), "fp16"),
        ((8, 0), "bf16"),
        ((9, 0), "bf16"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert choose_precision("auto", gpu) == best
    for able, best in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=able: found)
        assert choose_precision("auto", cpu) == best
    assert choose_precision("fp16", cpu) == "fp16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.8, of some containers
    assert choose_precision("auto", cpu) == "fp32"


def test_compiled_graphs_are_one_for_each_shape(
    small: SmallData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With dynamo's "eager" backend, so that no C++ is built: the graphs are counted, not timed. Where dynamo makes
    none, as TORCHDYNAMO_DISABLE asks for, that is said once."""
    from ffcv_imnet.train import epoch as training

    graphs: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(next(x.shape for x in inputs if x.dtype == torch.uint8))
        return graph.forward

    monkeypatch.setattr(
        training,
        "compile_static",
        lambda module: torch.compile(module, dynamic=False, backend=backend),
    )
    settings = small.settings(
        tmp_path / "run",
        training__compile=True,
        training__epochs=3,
        resolution__max_res=64,
        resolution__start_ramp=1,
        resolution__end_ramp=2,
        validation__resolution=48,
    )
    torch._dynamo.reset()
    counters.clear()
    training.say_how_compiled.cache_clear()
    assert run(settings) == 0
    sides = sorted(shape[-1] for shape in graphs)
    assert sides == [32, 48, 64], "one graph a resolution, none for the last batch"
    assert "training.compile" not in capfd.readouterr().err
    counters.clear()
    training.say_how_compiled.cache_clear()
    # By its own means: monkeypatch leaves it without the setting.
    with torch._dynamo.config.patch(disable=True):
        again = replace(settings, logging=replace(settings.logging, folder=str(tmp_path / "2")))
        assert run(again) == 0
    assert capfd.readouterr().err.count("training.compile: the network is not compiled") == 1


# ---- as a user would, from the command line ----------------------------------------------------


def command(*arguments: object, timeout: float = 240) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.networks", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@dataclass(frozen=True)
class Done:
    """A script that ended."""

    returncode: int
    stdout: str
    stderr: str


def inside(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """`command` without a process of its own, which takes four seconds to import torch."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(sys, "argv", ["train_imagenet.py", *map(str, arguments)])
        run_main(train_imagenet.main)
    assert isinstance(end.value.code, int)
    return Done(end.value.code, *capsys.readouterr())


def test_dry_run_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    done = inside(capsys, "--config", "rn_configs/rn18_16ep.yaml", "--dry_run", "--lr.lr=0.25")
    assert done.returncode == 0 and done.stderr == ""
    assert "1,281,167 training images (ImageNet's number" in done.stdout
    assert "lr: {lr: 0.25" in done.stdout
    plan, estimate = done.stdout.split("\n\n")[2:4]
    rows = [line.split() for line in plan.splitlines()[2:]]
    assert [int(row[1]) for row in rows] == [160] * 12 + [192] * 4
    assert estimate.startswith("cost estimate:")


def test_dry_run_takes_the_number_from_a_manifest(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(to_yaml(small.settings(tmp_path)))
    done = inside(capsys, "--config", config, "--dry_run")
    assert "100 training images" in done.stdout and done.returncode == 0
    assert "33 validation images" in done.stdout and "cost estimate: seconds" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--lr.lrr=1"], 2, "did you mean lr.lr?"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
        (["--data.train_dataset=nowhere/train.beton"], 2, "write_ffcv.py --split train"),
        (["--training.batch_size=1024"], 2, "larger than the 100 training images"),
        (["--data.num_workers=4096"], 2, "4096 is more than"),
        (["--model.arch=resnet19"], 2, "did you mean resnet18?"),
        (["--logging.folder={file}"], 2, "is a file"),
        (["--logging.folder=."], 2, "is the current folder or holds .beton files"),
        (["--logging.folder={data}"], 2, "is the current folder or holds .beton files"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], status: int, says: str, small: SmallData, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = tmp_path / "c.yaml"
    config.write_text(to_yaml(small.settings(tmp_path / "run")))
    done = inside(
        capsys,
        "--config",
        config,
        *(word.format(file=config, data=small.train.parent) for word in arguments),
    )
    assert done.returncode == status
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_failed_work_is_status_1(small: SmallData, tmp_path: Path) -> None:
    damaged = damage(small, tmp_path, sample=5)
    config = tmp_path / "c.yaml"
    config.write_text(to_yaml(damaged.settings(tmp_path / "run", training__batch_size=100)))
    done = command("--config", config)
    assert done.returncode == 1
    assert "the image of sample 5, class" in done.stderr and "Traceback" not in done.stderr


def test_damaged_images_are_counted_in_the_log(
    small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Across checkpoints within the epoch, in training and in validation; nobody counts without the setting."""
    where = int(epoch_order(100, 0, 0)[3])  # in the first batch of epoch 0
    damaged = damage(small, tmp_path, sample=where)
    settings = damaged.settings(
        tmp_path / "run",
        data__val_dataset=damaged.train,
        data__on_damaged="skip",
        training__epochs=1,
        training__checkpoint_minutes=1e-9,
    )
    assert run(settings) == 0
    (epoch,) = read_log(tmp_path / "run").epochs
    assert epoch.skipped == 1 and epoch.val_skipped == 1
    assert "skipped 1  val_skipped 1" in capsys.readouterr().out
    assert round(epoch.top_1 * 99, 6).is_integer()
    whole = small.settings(tmp_path / "whole", training__epochs=1)
    assert run(whole) == 0
    (epoch,) = read_log(tmp_path / "whole").epochs
    assert epoch.skipped is None and epoch.val_skipped is None


def test_a_run_stopped_by_a_damaged_image_goes_on_without_it(
    small: SmallData, tmp_path: Path
) -> None:
    where = int(epoch_order(100, 0, 0)[40])
    damaged = damage(small, tmp_path, sample=where)
    options = {"training__epochs": 1, "training__checkpoint_minutes": 1e-9}
    with pytest.raises(RunError, match=r"data\.on_damaged=skip"):
        run(damaged.settings(tmp_path / "run", **options))
    assert run(damaged.settings(tmp_path / "run", **options, data__on_damaged="skip"), "auto") == 0
    (epoch,) = read_log(tmp_path / "run").epochs
    assert epoch.skipped == 1


def test_killed_in_mid_epoch_and_resumed(whole: Path, small: SmallData, tmp_path: Path) -> None:
    """SIGKILL, which nothing can catch, at whatever point after the first epoch's line."""
    config = tmp_path / "c.yaml"
    settings = small.settings(tmp_path / "run", **FULL, training__checkpoint_minutes=1e-9)
    config.write_text(to_yaml(settings))
    words = [sys.executable, "-m", "tests.networks", "--config", str(config)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 0"):
                process.kill()
    assert run(settings, "auto") == 0
    assert results(read_log(tmp_path / "run")) == results(read_log(whole))


def test_two_processes(small: SmallData, tmp_path: Path) -> None:
    """torchrun, gloo: the same batches, the same number of images, one log.

    Each process meets one damaged image in the first epoch: the log counts both.
    """
    config = tmp_path / "c.yaml"
    damaged = small
    for place in (3, 31):
        damaged = damage(damaged, tmp_path, sample=int(epoch_order(100, 0, 0)[place]))
    settings = damaged.settings(
        tmp_path / "run",
        model__arch="resnet18",
        training__ema_decay=0.5,
        training__batch_size=32,
        data__on_damaged="skip",
    )
    config.write_text(to_yaml(settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "train_imagenet.py", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run")
    assert log.headers[0].world_size == 2 and len(log.epochs) == 2 and log.summary is not None
    assert all(isinstance(epoch, Epoch) for epoch in log.epochs)
    assert all(round(epoch.top_1 * 33, 6).is_integer() for epoch in log.epochs)
    assert log.epochs[0].skipped == 2 and log.epochs[0].val_skipped == 0
    assert "skipped 2" in done.stdout


def test_one_folder_one_run(small: SmallData, tmp_path: Path) -> None:
    """Two that start at the same moment both find the folder empty: the lock decides."""
    import fcntl

    (tmp_path / "run").mkdir()
    folder = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another process is training in it"):
        run(small.settings(tmp_path / "run"))
    os.close(folder)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made(small: SmallData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/run could not be written: its folder is a file"):
        run(small.settings(tmp_path / "file/run"))

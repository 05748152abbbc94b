"""TensorBoard's and Weights & Biases' files hold what the JSON log holds."""

import sys
import time
from pathlib import Path

import pytest

import train_imagenet
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.log import Epoch, read_log
from ffcv_imnet.train.trackers import check_trackers, numbers
from tests.conftest import SmallData
from tests.test_report import epoch


def train(settings: Settings, resume: str | None = None) -> list[Epoch]:
    assert train_imagenet.train(settings, resume, time.perf_counter()) == 0
    return read_log(Path(settings.logging.folder)).epochs


def test_tensorboard_reads_back_what_the_log_says(small: SmallData, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = small.settings(
        tmp_path / "run", logging__trackers="tensorboard", training__ema_decay=0.9
    )
    epochs = train(settings)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(numbers(epochs[0]))
    for name in numbers(epochs[0]):
        read = [(event.step, event.value) for event in events.Scalars(name)]
        assert read == [
            (e.epoch, pytest.approx(numbers(e)[name], rel=1e-6)) for e in epochs  # float32
        ]  # fmt: skip


def test_of_the_norms_those_of_the_last_step_are_numbers() -> None:
    rows = [
        {"step": 2, "loss": 2.0, "sgd_update": 0.1},
        {"step": 9, "loss": 1.5, "sgd_update": 0.3},
    ]
    given = numbers(epoch(1, 0.4, norms=rows))
    assert (given["top_1"], given["sgd_update"]) == (0.4, 0.3)
    assert not given.keys() & {"epoch", "norms", "step", "loss"}
    assert "norms" not in numbers(epoch(1, 0.4))


def test_wandb_writes_offline(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(small.settings(tmp_path / "run", logging__trackers="wandb"))
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"train_loss" in content and b"ema_top_1" not in content


def test_a_tracker_without_its_package_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(load().logging.trackers)
    with pytest.raises(UsageError, match=r"logging\.trackers: wandb .* pip install wandb"):
        check_trackers(load(logging__trackers="wandb").logging.trackers)

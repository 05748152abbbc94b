"""A small generated data set, written once by the project's own writer."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tests.networks  # noqa: F401  (registers the tiny network)
import write_ffcv
from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.signals import ENDING
from ffcv_imnet.images import synthetic as shapes


@dataclass(frozen=True)
class SmallData:
    """100 training and 33 validation images of ten classes: neither fills its last batch."""

    train: Path
    val: Path
    train_samples: int
    val_samples: int

    def settings(self, folder: Path, **overrides: object) -> Settings:
        """Two epochs of a tiny network at 32 px, in fp32."""
        plain: dict[str, object] = {
            "model__arch": "tiny",
            "data__train_dataset": self.train,
            "data__val_dataset": self.val,
            "data__num_workers": 1,
            "logging__folder": folder,
            "resolution__min_res": 32,
            "resolution__max_res": 32,
            "validation__resolution": 32,
            "validation__batch_size": 16,
            "training__batch_size": 16,
            "training__epochs": 2,
            "training__precision": "fp32",
            "lr__lr": 0.05,
            "lr__lr_peak_epoch": 1,
        }
        return load(**{**plain, **overrides})


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    root = tmp_path_factory.mktemp("small")
    shapes.write_tree(root / "images", train_per_class=10, val_per_class=4)
    folder = ["--data_dir", str(root / "images"), "--out_dir", str(root), "--num_workers", "1"]
    assert write_ffcv.main(["--split", "train", *folder]) == 0
    assert write_ffcv.main(["--split", "val", "--subset", "33", *folder]) == 0
    return SmallData(root / "train.beton", root / "val.beton", 100, 33)


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """A run in this process installs its own handlers; pytest gets its back.

    A shell starts background jobs with Ctrl-C ignored, and Python leaves it so: the tests do not.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ENDING:  # a fixture of several tests may have made a run
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

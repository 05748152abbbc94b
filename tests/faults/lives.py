"""Runs of train_imagenet.py that somebody may hurt: each is a process group of its own.

They are forked from a process that has imported torch and ffcv and computed nothing: what imports
take, nobody can lose, and a hundred lives are a matter of minutes.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from ffcv.pipeline.compiler import Compiler

import tests.networks  # noqa: F401  (registers the tiny network)
import train_imagenet
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import run_main
from ffcv_imnet.core.log import read_log
from ffcv_imnet.data.beton import Manifest, manifest_path
from ffcv_imnet.data.loader import TrainLoader
from ffcv_imnet.images import synthetic as shapes
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train import checkpoint, validate  # noqa: F401  (imported here, once for all)
from tests.conftest import SmallData
from tests.test_training import results, same_weights

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds within which every fault must have been said


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    kind: str
    injected: str
    happened: str
    lost: str
    well: bool


class Life:
    """One start of a run, in a process group of its own."""

    def __init__(self, main: Callable[[], int | None], words: Path, **environment: str) -> None:
        self.words = words
        self.begin = words.stat().st_size if words.exists() else 0
        self.started = time.perf_counter()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(main, environment)
        self.status: int | None = None
        self.megabytes = 0.0  # at most, of what it had in memory

    def _live(self, main: Callable[[], int | None], environment: dict[str, str]) -> None:
        status = 70
        try:
            os.setsid()
            words = os.open(self.words, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(words, 1)
            os.dup2(words, 2)
            os.environ.update(environment)
            run_main(main)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def alive(self) -> bool:
        if self.status is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.megabytes = used.ru_maxrss / 1024
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def until(self, happened: Callable[[], bool], seconds: float = 600) -> bool:
        """Wait for that, or for the life's end; whether it happened."""
        end = time.perf_counter() + seconds
        while not (done := happened()) and self.alive() and time.perf_counter() < end:
            time.sleep(0.001)
        return done

    def send(self, number: int) -> None:
        os.killpg(self.pid, number)

    def end(self, seconds: float = 600) -> int | None:
        """Its exit status; None, and a kill, if it hangs."""
        self.until(lambda: not self.alive(), seconds)
        if self.alive():
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.status = -signal.SIGKILL
            return None
        return self.status

    def said(self) -> str:
        """What this life printed."""
        with self.words.open("rb") as file:
            file.seek(self.begin)
            return file.read().decode(errors="replace")

    def error(self) -> str:
        """The line with its error, or its last one."""
        lines = [line for line in self.said().splitlines() if line.strip()]
        return next((line for line in lines if line.startswith("error: ")), (lines or [""])[-1])


def train(settings: Settings, *arguments: str, **environment: str) -> Life:
    """`train_imagenet.py` under these settings; its words in FOLDER.txt."""
    folder = Path(settings.logging.folder)
    config = folder.with_suffix(".yaml")
    config.write_text(to_yaml(settings))
    return train_config(config, folder, *arguments, **environment)


def train_config(config: Path, folder: Path, *arguments: str, **environment: str) -> Life:
    """The same with a config file."""
    words = ["train_imagenet.py", "--config", str(config), f"--logging.folder={folder}"]

    def main() -> int:
        sys.argv = [*words, *arguments]
        return train_imagenet.main()

    return Life(main, folder.with_suffix(".txt"), **environment)


def warm(data: SmallData) -> None:
    """Let numba compile what every life needs. No thread is started: none would survive a fork."""
    world = World(0, 1, 0, 1, torch.device("cpu"))
    with patch.object(Compiler, "set_num_threads"):
        TrainLoader(str(data.train), data.train_samples, data.settings(data.train.parent), world)
    torch.set_num_threads(1)


def write_data(root: Path, per_class: int = 10) -> SmallData:
    """Generated images of ten classes, written by write_ffcv.py."""
    shapes.write_tree(root / "images", train_per_class=per_class, val_per_class=4)
    for split in ("train", "val"):
        words = ["--split", split, "--data_dir", root / "images", "--out_dir", root]
        command = [sys.executable, "write_ffcv.py", *map(str, words), "--num_workers", "1"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return open_data(root)


def open_data(root: Path) -> SmallData:
    """What was written there."""
    train, val = root / "train.beton", root / "val.beton"
    samples = [Manifest.load(manifest_path(path)).samples for path in (train, val)]
    data = SmallData(train, val, *samples)
    warm(data)
    return data


def same_run(folder: Path, undisturbed: Path) -> bool:
    """Whether weights, optimizer, average and log are the same, bit for bit, no epoch twice or missing."""
    log, wanted = read_log(folder), read_log(undisturbed)
    numbers = [epoch.epoch for epoch in log.epochs]
    return (
        numbers == list(range(len(wanted.epochs)))
        and results(log) == results(wanted)
        and same_weights(folder / "last.pt", undisturbed / "last.pt")
    )


def changes_of(path: Path) -> Callable[[], int]:
    """How often `path` was replaced since, as seen by whoever asks often enough."""

    def seen() -> tuple[int, int] | None:
        try:
            now = path.stat()
        except FileNotFoundError:
            return None
        return now.st_ino, now.st_mtime_ns

    last, count = seen(), 0

    def changes() -> int:
        nonlocal last, count
        if (now := seen()) != last:
            last, count = now, count + 1
        return count

    return changes

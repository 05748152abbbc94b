"""Power cuts: every write, fsync and rename of a real run is recorded, and every prefix of them played
into a folder without what the disk had not been made to keep.

    python -m tests.faults.replay --epochs 60 --dir /disk/of/its/own

The disk is as unkind as POSIX lets it be: of a file only what was there at its last fsync is kept; of the
names in a folder those at its last fsync, and of the changes after it none, all, or some in any order.
At each prefix `--resume auto` must find a sound state with every epoch that had been announced by then.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import train_imagenet
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core import atomic
from ffcv_imnet.data.beton import Manifest, manifest_path
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train.run_dir import open_run
from tests.conftest import SmallData

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
VARIANTS = "none", "all", "some"  # of the changes of names that were not forced

Event = tuple[Any, ...]


class Recorder:
    """What happens to files below `root`, in order."""

    def __init__(self, root: Path) -> None:
        self.root, self.events = root, list[Event]()

    def add(self, what: str, path: object, *more: Any) -> None:
        name = os.path.relpath(str(path), self.root)
        if not name.startswith(".."):
            self.events.append((what, name, *more))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """All that core/atomic.py does, and what is printed, which is what is announced."""
        recorder, fsync, link = self, os.fsync, os.link
        replace, unlink = Path.replace, Path.unlink

        class Raw(atomic._Raw):
            def __init__(self, path: Path, mode: str) -> None:
                super().__init__(path, mode)
                recorder.add("open", path, mode)

            def write(self, data: Any) -> int:
                recorder.add("write", self.name, bytes(data))
                return super().write(data)

        class Said:
            def write(self, text: str) -> int:
                if text.startswith("epoch "):
                    recorder.events.append(("announce", int(text.split()[1])))
                return len(text)

            def flush(self) -> None:
                pass

        def forced(number: int) -> None:
            fsync(number)
            path = Path(f"/proc/self/fd/{number}").readlink()
            recorder.add("fsync folder" if path.is_dir() else "fsync", path)

        def replaced(path: Path, target: Path) -> Path:
            recorder.add("rename", path, os.path.relpath(target, recorder.root))
            return replace(path, target)

        def linked(source: Path, target: Path) -> None:
            link(source, target)
            recorder.add("link", source, os.path.relpath(target, recorder.root))

        def unlinked(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                recorder.add("unlink", path)
            unlink(path, missing_ok=missing_ok)

        said: Any = Said()
        with (
            patch.object(atomic, "_Raw", Raw), patch.object(os, "fsync", forced),
            patch.object(os, "link", linked), patch.object(Path, "replace", replaced),
            patch.object(Path, "unlink", unlinked), redirect_stdout(said),
        ):  # fmt: skip
            yield


@dataclass
class Disk:
    """Files by number, and the names in the one folder; what of either is kept."""

    content: dict[int, bytearray] = field(default_factory=dict)
    kept: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    kept_names: dict[str, int] = field(default_factory=dict)
    changes: list[dict[str, int | None]] = field(default_factory=list)  # of names, not forced yet
    announced: int = 0  # epochs

    def change(self, **names: int | None) -> None:
        self.changes.append(names)
        _apply(self.names, names)

    def play(self, event: Event) -> None:
        what, name, *more = event
        if what == "announce":
            self.announced = name + 1
        elif what == "open":
            if name not in self.names:
                number = len(self.content)
                self.content[number], self.kept[number] = bytearray(), b""
                self.change(**{name: number})
            elif more[0] == "w":
                self.content[self.names[name]].clear()
        elif what == "write":
            self.content[self.names[name]] += more[0]
        elif what == "fsync":
            number = self.names[name]
            self.kept[number] = bytes(self.content[number])
        elif what == "fsync folder" and name == ".":
            self.kept_names, self.changes = dict(self.names), []
        elif what == "rename":
            self.change(**{more[0]: self.names[name], name: None})
        elif what == "link":
            self.change(**{more[0]: self.names[name]})
        elif what == "unlink":
            self.change(**{name: None})

    def after_a_cut(self, variant: str, draw: random.Random) -> dict[str, bytes]:
        """Names and contents that are left."""
        names = dict(self.kept_names)
        changes = list(self.changes)
        if variant == "none":
            changes = []
        elif variant == "some":
            changes = draw.sample(changes, draw.randint(0, len(changes)))
        for change in changes:
            _apply(names, change)
        return {name: self.kept[number] for name, number in names.items()}


def _apply(names: dict[str, int], change: dict[str, int | None]) -> None:
    for name, number in change.items():
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def record(settings: Settings) -> list[Event]:
    """A run from its beginning to its end."""
    folder = Path(settings.logging.folder)
    recorder = Recorder(folder)
    with recorder.recording():
        assert train_imagenet.train(settings, None, time.perf_counter()) == 0
    return recorder.events


def check(events: list[Event], settings: Settings, data: SmallData, prefixes: int) -> Counter[str]:
    """Play `prefixes` of them, evenly, in each variant; what was found, by kind."""
    train, val = (Manifest.load(manifest_path(path)) for path in (data.train, data.val))
    chosen = {round(n * len(events) / prefixes) for n in range(1, prefixes + 1)}
    disk, draw, counts = Disk(), random.Random(0), Counter[str]()
    folder = Path(settings.logging.folder)
    for number, event in enumerate(events, 1):
        disk.play(event)
        for variant in VARIANTS if number in chosen else ():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, content in disk.after_a_cut(variant, draw).items():
                (folder / name).write_bytes(content)
            try:
                run = open_run(settings, "auto", train, val, ALONE, time.perf_counter())
                found = len(run.epochs)
            except Exception as error:
                counts[f"{variant}: NOT SOUND: {error}"[:200]] += 1
                continue
            lost = disk.announced - found
            counts[f"{variant}: LOST {lost} epochs at event {number}" if lost > 0 else variant] += 1
    return counts


def main() -> int:
    """Exit status 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="tests.faults.replay", description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--prefixes", type=int, default=1000)
    parser.add_argument("--dir", type=Path, default=None)
    options = parser.parse_args()
    from tests.faults.lives import write_data

    with tempfile.TemporaryDirectory(dir=options.dir) as root:
        place = Path(root)
        data = write_data(place / "data", per_class=10)
        settings = data.settings(
            place / "run", training__epochs=options.epochs, training__checkpoint_minutes=1e-9
        )
        events = record(settings)
        counts = check(events, settings, data, min(options.prefixes, len(events)))
    print(
        json.dumps(
            {"events": dict(Counter(event[0] for event in events)), "found": dict(counts)}, indent=1
        )
    )
    return 0 if set(counts) <= set(VARIANTS) else 1


if __name__ == "__main__":
    raise SystemExit(main())

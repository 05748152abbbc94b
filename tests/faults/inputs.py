"""Every path that a command takes, given a pipe, a device, a socket, a folder or nothing: one sentence at once.

python -m tests.faults --only inputs
"""

import importlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ffcv_imnet.__main__ import main as tools
from tests.archives import member, tar_of
from tests.conftest import SmallData
from tests.faults.lives import Life, Row
from tests.faults.outside import copy_of
from tests.pictures import picture, save

QUICK = 10.0  # seconds within which each is refused

# What each place of a path is called, the command, and its words with the path in them. {b}: a folder with
# train.beton and val.beton; {r}: a finished run; {d}: images; {o}: a place that may be written.
PLACES = {
    "--config": ("train", "--config {x} --dry_run"),
    "--config of two": ("train", "--config {r}/config.yaml --config {x} --dry_run"),
    "data.train_dataset": ("train", "--config {r}/config.yaml --logging.folder={o} --data.train_dataset={x}"),
    "data.val_dataset": ("train", "--config {r}/config.yaml --logging.folder={o} --data.val_dataset={x}"),
    "train.json": ("train", "--config {r}/config.yaml --logging.folder={o} --data.train_dataset={m}/train.beton"),
    "--resume": ("train", "--config {r}/config.yaml --logging.folder={o} --resume {x}"),
    "last.pt": ("train", "--config {f}/config.yaml --logging.folder={f} --resume auto"),
    "logging.folder": ("train", "--config {r}/config.yaml --logging.folder={x}"),
    "--data_dir": ("write", "--split train --data_dir {x} --out_dir {o}"),
    "an image": ("write", "--split train --data_dir {i} --out_dir {o} --num_workers 1"),
    "--labels": ("write", "--split val --data_dir {d} --labels {x} --out_dir {o}"),
    "--tar": ("write", "--split train --tar {x} --out_dir {o}"),
    "--tar of val": ("write", "--split val --tar {x} --labels {x} --out_dir {o}"),
    "--parquet": ("write", "--split train --parquet {x} --out_dir {o}"),
    "a shard": ("write", "--split train --parquet {p} --out_dir {o}"),
    "--out_dir": ("write", "--split train --data_dir {d} --out_dir {x}"),
    "report": ("report", "{x} --out {o}.html"),
    "log.jsonl": ("report", "{l} --out {o}.html"),
    "compare": ("compare", "{x} --against {r}"),
    "compare --against": ("compare", "{r} --against {x}"),
    "sweep": ("sweep", "{x} --out {o}"),
    "migrate": ("migrate", "{x}"),
    "verify": ("verify", "{x}"),
    "verify a .beton": ("verify", "{b}/{x.name}.beton"),
    "verify --labels": ("verify", "{d} --labels {x}"),
    "adopt": ("adopt", "{x}"),
    "adopt --classes": ("adopt", "{b}/train.beton --classes {x} --force"),
    "evaluate --weights": ("evaluate", "--weights {x} --data {b}/val.beton"),
    "evaluate .safetensors": ("evaluate", "--weights {w}/w.safetensors --data {b}/val.beton"),
    "evaluate .onnx": ("evaluate", "--weights {w}/w.onnx --data {b}/val.beton"),
    "evaluate --data": ("evaluate", "--weights {r}/best.pt --data {x}"),
    "export --weights": ("export", "--weights {x} --out {o}.onnx"),
    "export --data": ("export", "--weights {r}/best.pt --data {x} --out {o}.onnx"),
    "predict an image": ("predict", "--weights {r}/best.pt {x}"),
    "predict --weights": ("predict", "--weights {x} {d}/a.jpg"),
    "samples --beton": ("samples", "--beton {x} --out {o}.png"),
    "benchmark --beton": ("benchmark", "loader --beton {x}"),
    "prepare --train_tar": ("prepare", "--train_tar {x} --out_dir {o}"),
    "prepare --val_labels": ("prepare", "--val_tar {t} --val_labels {x} --out_dir {o}"),
}  # fmt: skip


def make_things(folder: Path) -> dict[str, Path]:
    """What stands in the place of a file. The socket stays bound as long as the process lives."""
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(folder / "socket"))  # at most 108 bytes
    _open.append(listening)
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "circle").symlink_to("circle")
    (folder / "zeros").symlink_to("/dev/zero")
    (folder / "nothing").symlink_to("/dev/null")
    (folder / "closed").write_text("secret")
    (folder / "closed").chmod(0)
    return {path.name: path for path in sorted(folder.iterdir())} | {"absent": folder / "absent"}


_open: list[socket.socket] = []

# What is right there, and would start a training or an hour of work.
FINE = {
    "--config": {"empty"},
    "--config of two": {"empty"},
    "last.pt": {"circle", "absent"},
    "logging.folder": {"folder", "absent"},
    "--out_dir": {"folder", "absent"},
}


def command(tool: str, words: list[str]) -> Callable[[], int | None]:
    """What `python -m ffcv_imnet TOOL WORDS` calls."""

    def main() -> int | None:
        sys.argv = ["ffcv_imnet", tool, *words]
        return tools()

    return main


def inputs(data: SmallData, folder: Path, whole: Path) -> Iterator[Row]:
    """A row for each place of a path; what was said to each thing in inputs.txt."""
    for tool, _ in PLACES.values():
        importlib.import_module(
            {"train": "train_imagenet", "write": "write_ffcv"}.get(tool, f"ffcv_imnet.tools.{tool}")
        )
    things = make_things(folder / "things")
    make_shared(folder / "shared")
    for place, (tool, words) in PLACES.items():
        faults = []
        said = {}
        for name, thing in things.items():
            if name in FINE.get(place, ()):
                continue
            own = folder / f"{place.replace(' ', '_').replace('/', '_')}_{name}"
            own.mkdir()
            life = Life(command(tool, fill_in(words, thing, data, whole, own)), own / "said.txt")
            status = life.end(QUICK)
            text = life.said()
            said[name] = f"{status}: {life.error()}"
            if status not in (1, 2) or text.count("error: ") > 1 or "Traceback" in text:
                faults.append(f"{name}: status {status}: {life.error()[:150]}")
            elif life.megabytes > 1000:
                faults.append(f"{name}: {life.megabytes:.0f} MB")
            elif (left := [path.name for path in own.glob("out*") if not path.is_dir()]) or (
                left := [path.name for path in (own / "out").rglob("*")]
            ):
                faults.append(f"{name}: left {left}")
        with (folder / "inputs.txt").open("a") as file:
            file.writelines(f"{place} | {name} | {text}\n" for name, text in said.items())
        happened = "; ".join(faults) or "one sentence each"
        yield Row("inputs", f"{place}: {len(things)} things", happened, "nothing", not faults)


def fill_in(words: str, thing: Path, data: SmallData, whole: Path, own: Path) -> list[str]:
    """The words with this thing where the place is; what a command may change is in `own`."""
    shared = own.parent / "shared"
    names = {"m": "train.json", "f": "last.pt", "l": "log.jsonl", "i": "train/a/x.jpg"}
    names |= {
        "p": "train-00000-of-00001.parquet",
        "w": f"w{thing.suffix}",
        "b": f"{thing.name}.beton",
    }
    for key, name in names.items():
        if "{" + key in words:
            place = own / key
            if key in "mb":
                copy_of(data, place)
            elif key == "i":
                shutil.copytree(shared / "train", place / "train")
            else:
                place.mkdir()
                shutil.copy(whole / "config.yaml", place)
            for ending in (".safetensors", ".onnx") if key == "w" else ("",):
                (place / (name + ending)).unlink(missing_ok=True)
                (place / (name + ending)).symlink_to(thing)
    places = {"x": thing, "r": whole, "d": shared, "o": own / "out", "t": shared / "val.tar"}
    return [word.format(**places, **{key: own / key for key in names}) for word in words.split()]


def make_shared(folder: Path) -> None:
    """Images in class folders, flat ones, and a tar of these."""
    for name in ("train/a/x.jpg", "train/b/x.jpg", "val/x.jpg", "a.jpg"):
        save(folder / name, picture(len(name)))
    image = member("ILSVRC2012_val_00000001.JPEG", (folder / "a.jpg").read_bytes())
    (folder / "val.tar").write_bytes(tar_of(image))

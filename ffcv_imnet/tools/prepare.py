"""Unpack ImageNet's tars into train/ and val/ with one folder a class.

python -m ffcv_imnet prepare --train_tar ILSVRC2012_img_train.tar \\
    --val_tar ILSVRC2012_img_val.tar --val_labels LOC_val_solution.csv --out_dir data/imagenet

Each class folder appears by rename when all of its files are there; run again after any
interruption it goes on where it stopped. (write_ffcv.py --tar needs no unpacking at all.)
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.atomic import drop_cached, locked, rename
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.core.signals import exit_when_asked
from ffcv_imnet.core.units import of_disk
from ffcv_imnet.images.labels import read_labels
from ffcv_imnet.images.sources import check_split
from ffcv_imnet.images.tar import TarArchive, describe_fault, index_tar
from ffcv_imnet.tools import ToolParser

HIDDEN = ".unpacking"  # beside train/ and val/: a folder inside them would count as a class
CLUSTER = 4096  # bytes: what a file takes on the disk is a multiple of this
SPARE = 1 << 28  # bytes left free


@dataclass(frozen=True)
class Split:
    """One archive and the folder that it becomes."""

    name: str  # train or val
    tar: Path
    images: TarArchive
    folder: Path

    def members(self, label: int) -> NDArray[np.int64]:
        """Indices of the images of a class."""
        first, last = np.searchsorted(self.images.labels, [label, label + 1])
        return np.arange(first, last)


def main(argv: list[str]) -> int:
    """Exit status 0 when both trees are whole."""
    options = parse(argv)
    exit_when_asked()
    with lock(options.out_dir) as hidden:
        splits = open_splits(options)
        todo = [(s, label) for s in splits for label in unfinished(s)]
        check_disk(options.out_dir, todo)
        unpack(todo, hidden)
    for split in splits:
        print_counts(split)
    damaged = [split for split in splits if split.images.fault]
    if damaged:
        raise RunError(describe_fault(damaged[0].tar, index_tar(damaged[0].tar)))
    if options.delete_tars:
        os.sync()
        for split in splits:
            compare(split)
        for split in splits:
            delete(split.tar)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError where it cannot be carried out."""
    parser = ToolParser("prepare", __doc__)
    add = parser.add_argument
    add("--train_tar", type=path_of, metavar="FILE", help="the tar of one tar a class")
    add("--val_tar", type=path_of, metavar="FILE", help="the flat tar")
    add("--val_labels", type=path_of, metavar="FILE",
        help="LOC_val_solution.csv, the devkit's .tar.gz, or a text with an image and a class a line")  # fmt: skip
    add("--out_dir", type=path_of, default=Path("data/imagenet"), metavar="DIR",
        help="gets train/ and val/ (default: %(default)s)")  # fmt: skip
    add("--delete_tars", action="store_true",
        help="delete each tar after its every file was compared with the unpacked one")  # fmt: skip
    options = parser.parse_args(argv)
    if options.train_tar is None and options.val_tar is None:
        raise UsageError("nothing to unpack: give --train_tar, --val_tar or both")
    if options.val_tar is not None and options.val_labels is None:
        raise UsageError("--val_tar needs --val_labels: its images lie side by side without labels")
    if options.val_labels is not None and options.val_tar is None:
        raise UsageError("--val_labels goes with --val_tar")
    return options


def open_splits(options: argparse.Namespace) -> list[Split]:
    """The archives, indexed. Of one that is truncated, the whole classes are taken."""
    found = []
    for name, tar in (("train", options.train_tar), ("val", options.val_tar)):
        if tar is None:
            continue
        check_split(tar, name)
        print(f"{tar}: reading its headers", flush=True)
        wnids = read_labels(options.val_labels) if name == "val" else None
        images = TarArchive(tar, wnids, damaged=True)
        what = f"{len(images):,} images of {len(images.classes):,} classes"
        print(f"{tar}: {what}" + (", TRUNCATED OR DAMAGED" if images.fault else ""), flush=True)
        found.append(Split(name, tar, images, options.out_dir / name))
    if len(found) == 2 and not any(split.images.fault for split in found):
        train, val = (set(split.images.classes) for split in found)
        if odd := sorted(train ^ val):
            raise UsageError(
                f"the two archives differ in {len(odd):,} classes, for instance {odd[0]}: the label"
                " file belongs to other images, or one archive is not whole"
            )
    return found


@contextmanager
def lock(out: Path) -> Iterator[Path]:
    """The hidden folder for what is unfinished, for this process alone; empty, removed at the end.

    Raises:
        UsageError: it cannot be made, or another process works there.
        RunError: the disk is full or fails.
    """
    hidden = out / HIDDEN
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    if not locked(handle):
        os.close(handle)
        raise UsageError(f"another prepare is unpacking into {out}")
    try:
        shutil.rmtree(hidden, ignore_errors=True)  # what a killed run left
        yield hidden
    except OSError as error:
        raise RunError(
            f"{error.filename or out} could not be written: {error.strerror}; run this again when"
            " that is mended, it goes on where it stopped"
        ) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(handle)


def unfinished(split: Split) -> list[int]:
    """The classes that are not there whole: missing, or with files missing or of another size.

    Raises:
        UsageError: a class folder holds what the archive does not.
    """
    todo = []
    for label, name in enumerate(split.images.classes):
        members = split.members(label).tolist()
        wanted = {split.images.file(i): int(split.images.sizes[i]) for i in members}
        have = sizes_below(split.folder / name)
        if foreign := sorted(set(have) - set(wanted)):
            raise UsageError(
                f"{split.folder / name} holds {foreign[0]!r}, which is not in {split.tar}: choose"
                " another --out_dir or move it away"
            )
        if have != wanted:
            todo.append(label)
    names = set(split.images.classes)
    if split.folder.is_dir() and not split.images.fault:
        for entry in os.scandir(split.folder):
            if entry.name not in names:
                raise UsageError(
                    f"{entry.path} is none of the classes of {split.tar}: choose another --out_dir"
                    " or move it away"
                )
    return todo


def sizes_below(folder: Path) -> dict[str, int]:
    """Bytes of every file in `folder`, by its path in there; nothing if there is no such folder."""
    root = len(str(folder)) + 1
    return {  # strings, since there are a million of them
        f"{place}/{file}"[root:]: os.lstat(f"{place}/{file}").st_size
        for place, _, files in os.walk(folder)
        for file in files
    }


def check_disk(out: Path, todo: list[tuple[Split, int]]) -> None:
    """Raises UsageError if the rest does not fit, by bytes or by number of files."""
    members = [(split, split.members(label)) for split, label in todo]
    need = sum(int((-(-s.images.sizes[m] // CLUSTER) * CLUSTER).sum()) for s, m in members)
    files = sum(len(m) for _, m in members)
    disk = os.statvfs(out)
    free = disk.f_bavail * disk.f_frsize
    print(f"to unpack: {files:,} files, {of_disk(need)}; {of_disk(free)} free in {out}")
    if need + SPARE > free:
        raise UsageError(
            f"{of_disk(need)} will not fit into the {of_disk(free)} free in {out}: make"
            " room, choose another --out_dir, or do without unpacking (write_ffcv.py --tar)"
        )
    if disk.f_files and files + 2 * len(todo) > disk.f_favail:
        raise UsageError(
            f"the file system of {out} can hold only {disk.f_favail:,} more files, not {files:,}"
        )


def unpack(todo: list[tuple[Split, int]], hidden: Path) -> None:
    """Write the classes of `todo`, each under `hidden` first."""
    total = sum(len(split.members(label)) for split, label in todo)
    with Progress(total, "unpacking") as progress:
        for split, label in todo:
            name = split.images.classes[label]
            partial = hidden / split.name / name
            for index in split.members(label).tolist():
                write_file(partial / split.images.file(index), split.images.read(index)[0])
                progress.update(1, f"{split.name}/{name}")
            target = split.folder / name
            target.parent.mkdir(exist_ok=True)
            if target.exists():  # damaged, as after a power cut
                target.rename(hidden / f"{split.name}-{name}-damaged")
            rename(partial, target)


def write_file(path: Path, data: bytes) -> None:
    """A new file; never through a link, never over another."""
    try:
        file = path.open("xb", buffering=0)
    except FileNotFoundError:
        path.parent.mkdir(parents=True)
        file = path.open("xb", buffering=0)
    with file:
        if file.write(data) != len(data):
            raise OSError(28, "No space left on device", str(path))


def print_counts(split: Split) -> None:
    """Images of every class, then their number."""
    counts = np.bincount(split.images.labels, minlength=len(split.images.classes)).tolist()
    for name, count in zip(split.images.classes, counts, strict=True):
        print(f"{split.name}/{name} {count:,}")
    print(f"{split.folder}: {sum(counts):,} images of {len(counts):,} classes")


def compare(split: Split) -> None:
    """Every unpacked file with the archive, byte by byte, as the disk holds it where the system tells.

    Raises:
        RunError: one differs; nothing was deleted.
    """
    with Progress(len(split.images), f"comparing {split.name}") as progress:
        for index in range(len(split.images)):
            path = split.folder / split.images.name(index)
            try:
                with path.open("rb") as file:
                    drop_cached(file)
                    same = file.read() == split.images.read(index)[0]
            except OSError:
                same = False
            if not same:
                raise RunError(
                    f"{path} is not what {split.tar} holds: the tars were kept; remove that file"
                    " and run this again"
                )
            progress.update(1)


def delete(tar: Path) -> None:
    """The archive and its cached index."""
    try:
        tar.unlink()
        tar.with_name(tar.name + ".index.npz").unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{tar} could not be deleted: {error.strerror}") from None
    print(f"deleted {tar}")

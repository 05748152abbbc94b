"""Let a .beton of FFCV's own writer train: check all of it, write its manifest beside it.

python -m ffcv_imnet adopt train_500_0.50_90.ffcv val_500_0.50_90.ffcv
python -m ffcv_imnet adopt train.beton val.beton --classes names.txt

For files of ffcv-imagenet's write_imagenet.py or of any DatasetWriter that have one image
(RGBImageField) and one class number (IntField), under whatever names. Files given together get the
same classes, so give both. The files themselves are only read.
"""

import argparse
import datetime
import re
from pathlib import Path

import numpy as np

from ffcv_imnet.core.bounded import read_at_most
from ffcv_imnet.core.errors import RunError, UsageError, in_range
from ffcv_imnet.core.names import fault_of, quoted
from ffcv_imnet.core.paths import path_of, path_or_address, what_is
from ffcv_imnet.core.signals import exit_when_asked
from ffcv_imnet.data import beton
from ffcv_imnet.data.foreign import read_content
from ffcv_imnet.data.remote import local_path
from ffcv_imnet.images.imagenet import CLASSES, classes_in, imagenet_names
from ffcv_imnet.images.stored import RAW
from ffcv_imnet.machine.host import usable_cores
from ffcv_imnet.tools import ToolParser

IMAGENET = {1_281_167, 50_000}  # images of its two splits
LARGEST = 1 << 26  # bytes of a text of class names
EXAMPLES = 3


def main(argv: list[str]) -> int:
    """Exit status 0 if every file has its manifest afterwards."""
    options = parse(argv)
    exit_when_asked()
    found = {path: beton.read_tables(path) for path in options.paths}
    classes = class_names(found, options.classes)
    for path, tables in found.items():
        manifest = adopt(path, tables, classes, options)
        print(
            f"{beton.manifest_path(path)}: {manifest.samples:,} images of {len(classes):,} classes"
            f" ({classes[0]} to {classes[-1]}), {manifest.content_checksum}"
        )
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError, also where a manifest is there already."""
    parser = ToolParser("adopt", __doc__)
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        type=path_or_address,
        metavar="FILE",
        help=".beton or .ffcv, of one data set; from an address (s3://BUCKET/NAME) it is copied into --cache_dir first",
    )
    add("--cache_dir", type=path_of, default=Path("data/cache"), metavar="DIR",
        help="of copies: that of training, data.cache_dir, which finds the manifest there (default: %(default)s)")  # fmt: skip
    add("--classes", type=path_of, metavar="FILE",
        help="names of the classes, one a line in the order of their numbers, or the manifest (.json) of"
        " a file of the same classes (default: ImageNet's ids where its counts fit, else numbers)")  # fmt: skip
    add("--keep_damaged", action="store_true",
        help="adopt a file in which images do not decode; train on it with --data.on_damaged=skip")  # fmt: skip
    cores = usable_cores()
    add("--num_workers", type=in_range(int, 1, cores), metavar="N", default=cores,
        help="decoding processes (default: all cores)")  # fmt: skip
    add("--force", action="store_true", help="replace a manifest that is there")
    options = parser.parse_args(argv)
    options.paths = [local_path(place, options.cache_dir) for place in options.paths]
    for path in options.paths:
        if not path.is_file():
            raise UsageError(f"{path}: {what_is(path)}")
        manifest = beton.manifest_path(path)
        if manifest == path:
            raise UsageError(f"{path} has a manifest's name: give the .beton or .ffcv file")
        if manifest.exists() and not options.force:
            raise UsageError(f"{path} has its manifest {manifest}; --force replaces it")
        if manifest.exists() and options.classes is None and _is_own(manifest):
            raise UsageError(
                f"{path} has write_ffcv.py's manifest {manifest}, which knows its classes by name: keep it, or name"
                " them with --classes"
            )
    return options


def _is_own(manifest: Path) -> bool:
    """Whether write_ffcv.py wrote it; a damaged one is nobody's."""
    try:
        return bool(beton.Manifest.load(manifest).settings)
    except (RunError, UsageError):
        return False


# --------------------------------------------------------------------------------- the classes


def class_names(found: dict[Path, beton.Tables], file: Path | None) -> tuple[str, ...]:
    """The names that the labels of all files are numbers of.

    Raises:
        UsageError: the labels are not 0 to n - 1, or more than the names of `file`.
    """
    labels = np.unique(np.concatenate([tables.labels for tables in found.values()]))
    where = ", ".join(map(str, found))
    if not len(labels):
        raise UsageError(f"{where}: no images")
    low, high = int(labels[0]), int(labels[-1])
    if low < 0:
        raise UsageError(f"{where}: labels go from {low} to {high}; number the classes from 0 on")
    if file is not None:
        names = read_names(file)
        if len(names) <= high:
            raise UsageError(f"--classes {file}: {len(names):,} names, but labels up to {high:,}")
        return names
    if len(labels) <= high:
        missing = int(np.argmax(labels != np.arange(len(labels))))
        raise UsageError(
            f"{where}: no image has the label {missing:,}, and labels go from {low:,} to {high:,}:"
            " give the training and the validation file together, number the classes from 0 on"
            " without gaps, or name all of them with --classes FILE"
        )
    images = {len(tables.labels) for tables in found.values()}
    if len(labels) == CLASSES and images <= IMAGENET:
        return tuple(imagenet_names())
    return tuple(map(str, range(len(labels))))


def read_names(file: Path) -> tuple[str, ...]:
    """Class names of a text, one a line, or of a manifest.

    Raises:
        UsageError: it cannot be read, or a name is empty or stands twice.
    """
    if file.suffix == ".json":
        return beton.Manifest.load(file).classes
    try:
        names = classes_in(read_at_most(file, LARGEST).decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"--classes {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--classes {file} is not a text in UTF-8, one name a line") from None
    seen: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if fault := fault_of(name):
            raise UsageError(f"--classes {file}, line {line}: {quoted(name)} {fault}")
        if name in seen:
            raise UsageError(f"--classes {file}: {name!r} stands in lines {seen[name]} and {line}")
        seen[name] = line
    if not names:
        raise UsageError(f"--classes {file} is empty")
    return names


# ------------------------------------------------------------------------------------ one file


def adopt(
    path: Path, tables: beton.Tables, classes: tuple[str, ...], options: argparse.Namespace
) -> beton.Manifest:
    """Read all of `path` and write its manifest.

    Raises:
        RunError: images do not decode, or the file changes meanwhile.
    """
    before = path.stat()
    content = read_content(path, tables, len(classes), options.num_workers)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise RunError(f"{path} was changed while it was read: run this again when it is complete")
    if content.faults and not options.keep_damaged:
        some = [f"sample {n:,} {fault}" for n, fault in list(content.faults.items())[:EXAMPLES]]
        raise RunError(
            f"{len(content.faults):,} of {len(tables.labels):,} images of {path} are damaged, for"
            f" instance {'; '.join(some)}: write the file again, or adopt it as it is with"
            " --keep_damaged and train with --data.on_damaged=skip"
        )
    manifest = beton.Manifest(
        format=beton.MANIFEST_FORMAT,
        split="val" if re.search(r"val|test|dev", path.name.lower()) else "train",
        samples=len(tables.labels),
        classes=classes,
        class_counts=tuple(np.bincount(tables.labels, minlength=len(classes)).tolist()),
        bytes=after.st_size,
        content_checksum=content.checksum,
        tables_checksum=tables.checksum,
        settings={},  # how another program chose and stored them is not known
        source={
            "kind": "adopted",
            "images": len(tables.labels),
            "raw": int((tables.modes == RAW).sum()),
            "damaged": len(content.faults),
        },
        skipped=(),
        versions={},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    manifest.save(beton.manifest_path(path))
    return manifest

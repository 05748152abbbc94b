"""Images to a .beton for FFCV, with a manifest beside it: one command a split.

The recipe: find the images; say what will be written and whether it fits; decode, shrink and
encode them in worker processes; lay the file out in order under a temporary name; verify it; put
it in place. The same images and settings give the same bytes, whatever the number of workers.
"""

from ffcv_imnet.core.errors import begin_script

if __name__ == "__main__":
    begin_script(lambda: None)  # before the slow imports

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray

from ffcv_imnet.core.atomic import partial_path
from ffcv_imnet.core.errors import Parser, RunError, UsageError, in_range, nearest, run_main
from ffcv_imnet.core.names import number_of, shown
from ffcv_imnet.core.paths import path_of, path_or_address, refuse_inside
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.core.signals import exit_when_asked
from ffcv_imnet.core.units import duration, of_disk, of_memory
from ffcv_imnet.data import beton, remote
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.encode import Bad, PixelSettings, encode_all, encode_image
from ffcv_imnet.images.folder import FOLDERS
from ffcv_imnet.images.forecast import forecast
from ffcv_imnet.images.holdout import hold_out
from ffcv_imnet.images.parallel import one_thread
from ffcv_imnet.images.pixels import MAX_PIXELS
from ffcv_imnet.images.remarks import (
    check_classes,
    check_oddities,
    class_folders,
    notes,
    oddities,
)
from ffcv_imnet.images.sources import (
    even_subset,
    open_source,
    open_undivided,
    reading_order,
)
from ffcv_imnet.machine.host import affinity_cores, available_memory, usable_cores

EXAMPLES = 3  # unreadable images named on the terminal
SMALLEST = 8  # pixels of a side: training's smallest resolution
VERIFIED = 64  # images encoded again afterwards, to compare with what the disk gives back
TRAINING_RATE = 1000  # images/s of training, for the disk's read rate when RAM is too small
EXAMPLE_COMMANDS = """examples:
  python write_ffcv.py --split train
  python write_ffcv.py --split val --data_dir /data/imagenet --out_dir /data/beton
  python write_ffcv.py --split train --tar ILSVRC2012_img_train.tar
  python write_ffcv.py --split val --tar ILSVRC2012_img_val.tar --val_labels LOC_val_solution.csv
  python write_ffcv.py --split train --parquet imagenet-1k/data
  python write_ffcv.py --split train --short_side 256 --compress_probability 0.5
  python write_ffcv.py --split train --subset 10000 --out_dir data/beton_small
  python write_ffcv.py --data_dir my_images --holdout 0.1 --out_dir data/mine       # both, from one set
  python write_ffcv.py --split train --data_dir images --labels train.csv
  python write_ffcv.py --split train --out_dir s3://bucket/imagenet
"""


# ------------------------------------------------------------------------------- command line


def side(text: str) -> int:
    """An argparse type: a length in pixels; 0 or none leaves the images' own size."""
    if text.lower() == "none" or text == "0":
        return 0
    with suppress(ValueError):
        if (value := int(text)) >= SMALLEST:
            return value
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a whole number of at least {SMALLEST} pixels, nor 0 for the images' own size"
    )


def split_name(text: str) -> str:
    """An argparse type: train or val."""
    if text not in FOLDERS:
        meant = next((split for split, names in FOLDERS.items() if text.lower() in names), None)
        hint = (
            f": give {meant}, which takes the folder {text} where there is no {meant}"
            if meant
            else nearest(text, list(FOLDERS))
        )
        raise argparse.ArgumentTypeError(f"{text!r} is neither train nor val{hint}")
    return text


def part(text: str) -> float:
    """An argparse type: a fraction between 0 and 1."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1, such as 0.1")


def build_parser() -> Parser:
    """The command line, each option declared once."""
    parser = Parser(
        prog="write_ffcv.py",
        description="Write an ImageFolder tree (DATA_DIR/SPLIT/<class>/*.jpg), Kaggle's layout,\n"
        "ImageNet's tars or parquet shards as OUT_DIR/SPLIT.beton for FFCV, at reduced\n"
        "resolution, with its manifest OUT_DIR/SPLIT.json. The same images are\n"
        "stored alike, whichever way they come.",
        epilog=EXAMPLE_COMMANDS,
        hint=" (--help lists the options)",
    )
    add = parser.add_argument
    add("--split", type=split_name, metavar="{train,val}", help="which one to write")
    add("--holdout", type=part, metavar="FRACTION",
        help="write both from a set without a validation split: this part of each class for val, copies"
        " of an image on one side, chosen by --seed")  # fmt: skip
    add("--data_dir", type=path_of, action="append", metavar="DIR",
        help="holds train/ and val/ (or validation/, valid/, dev/, test/), one folder a class in each, or"
        " Kaggle's layout; several are merged by class (default: data/imagenet)")  # fmt: skip
    add("--tar", type=path_or_address, metavar="FILE",
        help="read ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar in place instead; at an address"
        " (s3://BUCKET/NAME) it is copied into --cache_dir first")  # fmt: skip
    add("--parquet", type=path_of, metavar="DIR",
        help="read the Hugging Face hub's SPLIT-*.parquet instead (needs pyarrow)")  # fmt: skip
    add("--labels", "--val_labels", type=path_of, metavar="FILE",
        help="classes of images that lie in no class folders: a CSV, TSV or JSON-lines of file and class,"
        " a text with both on a line, LOC_val_solution.csv or the devkit's .tar.gz")  # fmt: skip
    add("--out_dir", type=path_or_address, default=Path("data/beton"), metavar="DIR",
        help="where the .beton and its manifest go (default: %(default)s); to an address they are uploaded"
        " from --cache_dir")  # fmt: skip
    add("--cache_dir", type=path_of, default=Path("data/cache"), metavar="DIR",
        help="copies of what is at an address (default: %(default)s)")  # fmt: skip
    add("--max_resolution", type=side, metavar="PIXELS",
        help="shrink to this longest side; 0: do not (default: 400)")  # fmt: skip
    add("--short_side", type=side, metavar="PIXELS",
        help="shrink to this shorter side instead; 0: do not")  # fmt: skip
    add("--jpeg_quality", type=in_range(int, 1, 100), default=90, metavar="1..100",
        help="(default: %(default)s)")  # fmt: skip
    add("--compress_probability", type=in_range(float, 0, 1), default=1.0, metavar="0..1",
        help="this part of the images is stored as JPEG, the rest as raw pixels, which load faster"
        " and take about ten times the space (default: %(default)s)")  # fmt: skip
    add("--max_pixels", type=in_range(int, 1, 2**40), default=MAX_PIXELS, metavar="N",
        help="refuse an image of more pixels, which may be a decompression bomb; each worker takes 3 to 12"
        " bytes a pixel (default: %(default)s)")  # fmt: skip
    add("--num_workers", type=in_range(int, 1), metavar="N",
        help="encoding processes (default: all cores this process may use)")  # fmt: skip
    add("--subset", type=in_range(int, 1), metavar="N",
        help="only N images, drawn evenly over the classes")  # fmt: skip
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0, metavar="N",
        help="of --holdout, --subset and --compress_probability (default: %(default)s)")  # fmt: skip
    add("--skip_bad", action="store_true", help="leave unreadable images out instead of failing")
    add("--allow_odd", action="store_true",
        help="go on where images would be left out or a folder is in two classes by a link, or where the classes seem to"
        " lie one level deeper, instead of failing")  # fmt: skip
    add("--force", action="store_true", help="replace a .beton that was written otherwise")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line as typed values, `max_resolution` and `short_side` as None where unused.

    Raises:
        UsageError: an option is unknown, missing, misspelt or impossible.
    """
    parser = build_parser()
    args = sys.argv[1:] if argv is None else argv
    parser.refuse_unknown(args)
    options, extra = parser.parse_known_args(args)
    if extra:
        raise UsageError(f"{extra[0]!r} is not an option (--help lists the options)")
    if options.split is None and options.holdout is None:
        raise UsageError("--split train or --split val is missing, or --holdout 0.1 to write both")
    if options.split is not None and options.holdout is not None:
        raise UsageError("--holdout writes both files from the training images: leave --split out")
    for other in ("tar", "parquet"):
        if options.data_dir and getattr(options, other):
            raise UsageError(f"--data_dir and --{other} exclude each other: give one of them")
    options.data_dir = options.data_dir or [Path("data/imagenet")]
    if options.max_resolution and options.short_side:
        raise UsageError("--max_resolution and --short_side exclude each other: give one of them")
    if options.max_resolution is None and not options.short_side:
        options.max_resolution = 400
    options.max_resolution = options.max_resolution or None
    options.short_side = options.short_side or None
    if options.num_workers is None:
        options.num_workers = usable_cores()
    if options.num_workers > (cores := affinity_cores()):
        raise UsageError(
            f"--num_workers {options.num_workers} is more than the {cores} cores that"
            " this process may use"
        )
    return options


# ------------------------------------------------------------------------ what will be written


@dataclass(frozen=True)
class Job:
    """One split to write: where from, where to, how."""

    split: str
    path: Path
    address: str | None  # where it is uploaded to
    source: ImageSource
    settings: PixelSettings
    recorded: dict[str, Any]  # the settings that decide the content, as the manifest holds them
    origin: dict[str, Any]  # the source, as the manifest holds it
    remarks: list[str]  # on the source, a sentence each
    num_workers: int
    skip_bad: bool


def find_source(options: argparse.Namespace) -> ImageSource:
    """The images as the command line names them.

    Raises:
        UsageError: they are not as they should be, or --allow_odd is wanted.
    """
    tar = options.tar
    if isinstance(tar, str):
        tar = remote.fetch(tar, options.cache_dir)
    if options.holdout is not None and not tar and not options.parquet:
        source = open_undivided(options.data_dir, options.labels)
    else:
        source = open_source(
            options.split or "train",
            options.data_dir,
            tar=tar,
            parquet=options.parquet,
            labels=options.labels,
        )
    check_classes(source)
    if not options.allow_odd:
        check_oddities(source)
    return source


def placed(out_dir: Path | str, name: str, cache_dir: Path) -> tuple[Path, str | None]:
    """Where a file is written, and the address it is uploaded to then."""
    if isinstance(out_dir, Path):
        return out_dir / name, None
    address = f"{out_dir.rstrip('/')}/{name}"
    remote.client(address)  # before hours of encoding
    return remote.copy_path(address, cache_dir), address


def plan(options: argparse.Namespace) -> list[Job]:
    """Find the images and choose among them. With --holdout two jobs, both still of all images.

    Raises:
        UsageError: the source is not as it should be, or --subset cannot be drawn from it.
    """
    settings = PixelSettings(
        max_resolution=options.max_resolution,
        short_side=options.short_side,
        jpeg_quality=options.jpeg_quality,
        compress_probability=options.compress_probability,
        seed=options.seed,
        max_pixels=options.max_pixels,
    )
    source = find_source(options)
    if options.labels is None:  # which says every image's class, wherever it lies
        option = "out_dir" if isinstance(options.out_dir, Path) else "cache_dir"
        refuse_inside(f"--{option}", getattr(options, option), class_folders(source))
    origin = {
        "kind": source.kind,
        "fingerprint": source.fingerprint(),
        "images": len(source),
        "ignored_files": source.ignored,
    }
    remarks = notes(source)
    if options.allow_odd:  # else there are none
        remarks += oddities(source)
    if options.subset is not None:
        chosen = even_subset(source.labels, len(source.classes), options.subset, options.seed)
        source = source.subset(chosen)
    recorded = {**asdict(settings), "subset": options.subset}
    del recorded["max_pixels"]  # what is stored does not depend on it
    if options.holdout is not None:
        recorded["holdout"] = options.holdout
    return [
        Job(
            split=split,
            path=path,
            address=address,
            source=source,
            settings=settings,
            recorded=recorded,
            origin=origin,
            remarks=remarks,
            num_workers=options.num_workers,
            skip_bad=options.skip_bad,
        )
        for split in (["train", "val"] if options.holdout is not None else [options.split])
        for path, address in [placed(options.out_dir, f"{split}.beton", options.cache_dir)]
    ]


def divide(jobs: list[Job]) -> list[Job]:
    """The jobs of --holdout, each with its own side of the images.

    Raises:
        UsageError: a class has not enough images.
    """
    first = jobs[0]
    fraction, order = first.recorded["holdout"], reading_order(first.source)
    held = hold_out(first.source, fraction, first.settings.seed, first.num_workers, order)
    return [
        replace(job, source=job.source.subset(np.flatnonzero(held == (job.split == "val"))))
        for job in jobs
    ]


def announce(job: Job) -> None:
    """Print what is about to happen.

    Raises:
        UsageError: it does not fit on the disk.
    """
    source, folder = job.source, job.path.parent
    expected = forecast(source, job.settings)
    free = shutil.disk_usage(folder).free
    ignored = job.origin["ignored_files"]
    print(
        f"{source.where}: {len(source):,} images of {len(source.classes):,} classes"
        + (f" ({number_of(ignored, 'file')} ignored: no image)" if ignored else "")
    )
    for remark in job.remarks:
        print(f"note: {remark}")
    print(
        f"expected: {of_disk(expected.bytes)} ({of_disk(free)} free in {folder}),"
        f" {duration(expected.seconds / job.num_workers)} with {job.num_workers} worker(s)"
    )
    memory = available_memory()
    if memory is not None and expected.bytes > memory:
        rate = TRAINING_RATE * expected.bytes / len(source)
        print(
            f"this is more than the {of_memory(memory)} of memory available here: at {TRAINING_RATE:,}"
            f" images/s training would read {of_disk(rate)}/s from the disk"
        )
    sys.stdout.flush()
    if expected.bytes > free:
        raise UsageError(
            f"about {of_disk(expected.bytes)} will not fit into the {of_disk(free)} free in {folder}:"
            " make room, choose another --out_dir, or store less (--max_resolution,"
            " --jpeg_quality, --subset)"
        )


# ------------------------------------------------------------------------------ already there


def differences(job: Job, said: beton.Manifest) -> list[str]:
    """How the file that is there differs from the one that is asked for, in words."""
    if not said.settings:  # see `adopt`
        return ["another program wrote it"]
    found = [
        f"it was written with {as_option(name, there)}, and this command has {as_option(name, here)}"
        for name in {**job.recorded, **said.settings}
        if (there := said.settings.get(name)) != (here := job.recorded.get(name))
    ]
    # With --holdout and without it the folders that are read may be others.
    same = (said.settings.get("holdout") is None) == (job.recorded.get("holdout") is None)
    if same and said.source.get("fingerprint") != job.origin["fingerprint"]:
        found.append(
            "the source images have changed, or were copied without their times (`cp -a`"
            " keeps them)"
        )
    if said.skipped and not job.skip_bad:
        found.append(f"it lacks {len(said.skipped):,} unreadable images (--skip_bad accepts that)")
    return found


def as_option(name: str, value: object) -> str:
    """A setting that a manifest records, as it is typed."""
    return f"no --{name}" if value is None else f"--{name} {value}"


def up_to_date(job: Job, cache_dir: Path) -> bool:
    """Whether the file is where it shall be and is what would be written.

    Raises:
        UsageError: something else is there, which only --force may replace.
    """
    if job.address is None:
        return is_here(job)
    said = remote.manifest_at(job.address, cache_dir)
    if said is not None and (found := differences(job, said)):
        raise UsageError(
            f"{job.address} is there already and differs: {'; '.join(found)}; --force replaces it"
        )
    return said is not None


def is_here(job: Job) -> bool:
    """Like `up_to_date`, of the file on this disk."""
    path = job.path
    if beton.repair_beton(path):
        print(f"{path}: the last run was stopped before its manifest was in place; done now")
    if not path.exists():
        return False
    try:
        found = differences(job, beton.check_beton(path))
    except (RunError, UsageError) as error:
        found = [str(error).split(":")[0]]
    if found:
        raise UsageError(
            f"{path} is there already and differs: {'; '.join(found)}; --force replaces it"
        )
    return True


# ------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Written:
    """What came of writing all images."""

    kept: NDArray[np.int64]  # their indices in the source, in stored order
    bad: list[Bad]
    content_checksum: str
    tables_checksum: str


def write_samples(file: IO[bytes], job: Job) -> Written:
    """Encode all of the source and lay it out in `file`, numbered in the order of the source.

    Raises:
        RunError: a worker died, or images are unreadable (see `report_bad`), or none
            is left of a class.
    """
    count = len(job.source)
    writer = beton.BetonWriter(file, count)
    digests = np.zeros((count, 32), np.uint8)
    contents = np.zeros(count, np.uint64)
    bad, lost = list[Bad](), list[int]()
    kept = np.ones(count, dtype=bool)
    order = reading_order(job.source)  # numbers in the file are the source's all the same
    indices = iter(order.tolist())
    started = time.perf_counter()
    encoded = encode_all(job.source, job.settings, writer.page_size, job.num_workers, order)
    with closing(encoded) as chunks, Progress(count, "writing") as progress:
        for chunk in chunks:
            for done in chunk:
                index = next(indices)
                if isinstance(done, Bad):
                    kept[index] = False
                    bad.append(done)
                elif job.skip_bad or not bad:  # else it goes on only to find all that are bad
                    writer.add(done, index)
                    digests[index] = np.frombuffer(done.digest, np.uint8)
                    contents[index] = done.content
                    lost += [index] if done.partly_lost else []
            progress.update(len(chunk), f"{len(bad):,} unreadable" if bad else "")
    report_bad(job, kept, bad)
    tables_checksum = writer.finish()
    rate = count / (time.perf_counter() - started)
    print(f"encoded and on the disk at {rate:,.0f} images/s; verifying", flush=True)
    if lost:
        names = ", ".join(shown(job.source.name(index)) for index in lost[:EXAMPLES])
        print(
            f"note: damaged in part, gray or shifted in places, and stored so: {number_of(len(lost), 'image')}, for"
            f" instance {names} (`python -m ffcv_imnet verify` names all)",
            flush=True,
        )
    if note := copies(job.source, contents, np.flatnonzero(kept)):
        print(f"note: {note}", flush=True)
    content = hashlib.sha256(digests[kept].data).hexdigest()
    return Written(np.flatnonzero(kept), bad, f"sha256:{content}", tables_checksum)


def copies(source: ImageSource, contents: NDArray[np.uint64], kept: NDArray[np.int64]) -> str:
    """A sentence on images of the same bytes in two classes, of which ImageNet may have some; else nothing."""
    order = kept[np.lexsort((source.labels[kept], contents[kept]))]
    one, other = order[:-1], order[1:]
    found = (contents[one] == contents[other]) & (source.labels[one] != source.labels[other])
    if not found.any():
        return ""
    named = [
        f"{shown(source.name(int(a)))} and {shown(source.name(int(b)))}"
        for a, b in zip(one[found][:EXAMPLES], other[found][:EXAMPLES], strict=True)
    ]
    return (
        f"images of the same bytes are in two classes, and stored under both: {'; '.join(named)}"
        f" ({found.sum():,} in all)"
    )


class Unreadable(RunError):
    """Images cannot be stored. Of --holdout's two files the other is then looked through as well."""


def report_bad(job: Job, kept: NDArray[np.bool_], bad: list[Bad]) -> None:
    """Name some unreadable images on stderr; all of them stand in the manifest, or where nothing is written
    in SPLIT.unreadable.txt.

    Raises:
        Unreadable: there are some and they may not be skipped, or a class has no others.
    """
    source = job.source
    lines = [f"{source.where}/{shown(image.name)}: {image.reason}" for image in bad]
    for line in lines[:EXAMPLES]:
        print(f"unreadable: {line}", file=sys.stderr)
    if bad and not job.skip_bad:
        listing = unreadable_list(job)
        listing.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
        raise Unreadable(
            f"{len(bad):,} of {len(source):,} images are unreadable (listed in {listing}) and no .beton was"
            " written: mend or remove them, or go on without them by --skip_bad"
        )
    if len(bad) > EXAMPLES:
        print(f"and {len(bad) - EXAMPLES:,} more; all are named in the manifest", file=sys.stderr)
    had, left = (
        np.bincount(labels, minlength=len(source.classes))
        for labels in (source.labels, source.labels[kept])
    )
    if lost := [name for name, a, b in zip(source.classes, had, left, strict=True) if a and not b]:
        raise Unreadable(f"no image of class {lost[0]} is readable in the {job.split} split")


def unreadable_list(job: Job) -> Path:
    """Where all unreadable images are named if nothing is written."""
    return job.path.with_suffix(".unreadable.txt")


def versions() -> dict[str, str]:
    """What the stored bytes may depend on. ffcv's own `__version__` is not its version."""
    return {
        "ffcv": importlib.metadata.version("ffcv"),
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def write(file: IO[bytes], job: Job) -> beton.Manifest:
    """Write `file`, whose name is still the temporary one, and its manifest; verify both."""
    done = write_samples(file, job)
    counts = np.bincount(job.source.labels[done.kept], minlength=len(job.source.classes))
    manifest = beton.Manifest(
        format=beton.MANIFEST_FORMAT,
        split=job.split,
        samples=len(done.kept),
        classes=tuple(job.source.classes),
        class_counts=tuple(counts.tolist()),
        bytes=os.fstat(file.fileno()).st_size,
        content_checksum=done.content_checksum,
        tables_checksum=done.tables_checksum,
        settings=job.recorded,
        source=job.origin,
        skipped=tuple({"path": image.name, "reason": image.reason} for image in done.bad),
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    waiting = partial_path(beton.manifest_path(job.path))
    manifest.save(waiting)
    expected = encoded_again(job, done.kept)
    beton.verify_beton(partial_path(job.path), expected, manifest=waiting)
    return manifest


def write_files(jobs: list[Job]) -> None:
    """Each file and its manifest under their names, and a line that says so; none before all are written:
    a new training file beside the old validation file would hold its images.

    Raises:
        Unreadable: images of one, or of both.
    """
    manifests, faults = [], []
    with ExitStack() as files:
        for job in jobs:
            file = files.enter_context(beton.partial_file(job.path))
            announce(job)
            try:
                manifests.append(write(file, job))
            except Unreadable as fault:
                faults.append(str(fault))
        if faults:
            raise Unreadable("; ".join(faults))
    # Outside that block: once the first has its name, nothing may be removed.
    for job, manifest in zip(jobs, manifests, strict=True):
        beton.commit_beton(job.path)
        unreadable_list(job).unlink(missing_ok=True)  # of an attempt before
        print(
            f"{job.path}: {manifest.samples:,} images of {len(manifest.classes):,} classes,"
            f" {of_disk(manifest.bytes)}, {manifest.content_checksum}"
        )


def encoded_again(job: Job, kept: NDArray[np.int64]) -> dict[int, bytes]:
    """Digests, by stored index, of a seeded choice of images read from the source once more."""
    count = min(VERIFIED, len(kept))
    chosen = np.random.default_rng(job.settings.seed).choice(len(kept), count, replace=False)
    digests = {}
    for stored in chosen.tolist():
        number = int(kept[stored])
        done = encode_image(job.source, number, number, job.settings, beton.PAGE_SIZE)
        if isinstance(done, Bad):
            raise RunError(f"{job.source.where}/{done.name} is no longer readable: {done.reason}")
        digests[stored] = done.digest
    return digests


# --------------------------------------------------------------------------------- the recipe


def main(argv: list[str] | None = None) -> int:
    """Write one split, or both. Exit status 0; see ffcv_imnet/core/errors.py for the others."""
    options = parse(argv)
    jobs = plan(options)
    waiting = [job for job in jobs if options.force or not up_to_date(job, options.cache_dir)]
    for job in jobs:
        if job not in waiting:
            print(f"{job.address or job.path} is up to date")
    one_thread()
    restore = exit_when_asked()
    try:
        if options.holdout is not None and waiting:
            waiting = divide(waiting)
        # An upload that failed finds its file written.
        write_files([j for j in waiting if j.address is None or options.force or not is_here(j)])
        for job in waiting:
            if job.address is not None:
                remote.put_beton(job.path, job.address)
                print(f"{job.address}: uploaded; {job.path} is its copy here")
    finally:
        restore()
    return 0


if __name__ == "__main__":
    run_main(main)

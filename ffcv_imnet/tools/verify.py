"""Check tars, trees, parquet shards and .beton files before a night is spent on them.

python -m ffcv_imnet verify ILSVRC2012_img_train.tar --md5
python -m ffcv_imnet verify data/imagenet
python -m ffcv_imnet verify imagenet-1k/data
python -m ffcv_imnet verify data/beton --data_dir data/imagenet

Prints one line a finding and a summary in JSON; exit status 0 only when all is well. An interrupted
check of images goes on where it stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.atomic import NotWritten, atomic_write
from ffcv_imnet.core.bounded import read_json
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.paths import path_of, path_or_address, what_is
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.core.signals import exit_when_asked
from ffcv_imnet.data import beton
from ffcv_imnet.data.remote import local_path
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.encode import Bad, PixelSettings, encode_image
from ffcv_imnet.images.folder import FOLDERS
from ffcv_imnet.images.holdout import hold_out
from ffcv_imnet.images.kaggle import images_of
from ffcv_imnet.images.parallel import CHUNK, in_order
from ffcv_imnet.images.parquet import ParquetShards, shards_of
from ffcv_imnet.images.pixels import BadImage, decode_rgb, is_partly_lost, open_image
from ffcv_imnet.images.remarks import check_classes, notes, oddities
from ffcv_imnet.images.sources import (
    even_subset,
    is_flat,
    open_source,
    open_undivided,
    reading_order,
    split_folder,
)
from ffcv_imnet.images.stored import sample_digest
from ffcv_imnet.machine.host import usable_cores
from ffcv_imnet.tools import ToolParser

MD5 = {  # torchvision/datasets/imagenet.py has the same
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
KINDS = {".beton": "beton", ".ffcv": "beton", ".tar": "tar", ".parquet": "parquet"}  # of files
IMAGES = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
NEARLY = 900  # classes named like synsets from which on a set is taken for ImageNet
# JPEGs by name: one is a PNG, these are CMYK (https://github.com/cytsai/ilsvrc-cmyk-image-list).
PNG_INSIDE = {"n02105855_2933.JPEG"}
CMYK = set(
    """n01739381_1309 n02077923_14822 n02447366_23489 n02492035_15739 n02747177_10752
    n03018349_4028 n03062245_4620 n03347037_9675 n03467068_12171 n03529860_11437 n03544143_17228
    n03633091_5218 n03710637_5125 n03961711_5286 n04033995_2932 n04258138_17003 n04264628_27969
    n04336792_7448 n04371774_5854 n04596742_4225 n07583066_647 n13037406_4650
    ILSVRC2012_val_00019877""".split()  # noqa: SIM905 - twenty-three lines otherwise
)
SAVE_EVERY = 10.0  # seconds between saves of how far a check of images is
SAMPLES = 256  # of a .beton, compared with their source
NEAR = 4.0  # mean difference of pixels that another version of a library may make


# -------------------------------------------------------------------------------------- findings


@dataclass
class Report:
    """What was found; `bad` is what decides the exit status."""

    findings: list[dict[str, str]] = field(default_factory=list)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def say(self, level: str, where: object, what: str) -> None:
        """One finding: `ok`, `odd` (expected or harmless) or `BAD`."""
        self.findings.append({"level": level, "where": str(where), "finding": what})
        print(f"{level:3}  {where}: {what}", flush=True)

    @property
    def bad(self) -> int:
        """Number of findings that must be mended."""
        return sum(finding["level"] == "BAD" for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """All of it, for JSON."""
        levels = [finding["level"] for finding in self.findings]
        problems = [finding for finding in self.findings if finding["level"] != "ok"]
        return {
            "well": not self.bad,
            "findings": {level: levels.count(level) for level in ("ok", "odd", "BAD")},
            "checked": self.counts,
            "problems": problems,
        }


def main(argv: list[str]) -> int:
    """Exit status 0 if all is well, 1 if something is not."""
    options = parse(argv)
    exit_when_asked()
    report = Report()
    classes: dict[str, tuple[str, ...]] = {}
    betons = list[Path]()
    for target in [found for path in options.paths for found in targets(path)]:
        if options.md5 and target.path.is_file():
            check_md5(target.path, report)
        try:
            names = check(target, options, report)
        except (RunError, UsageError) as error:
            report.say("BAD", target.path, str(error))
            continue
        if names:
            classes[str(target.path)] = names
            betons += [target.path] if target.kind == "beton" else []
    compare_classes(classes, report)
    compare_divisions(betons, report)
    print(json.dumps(report.summary()))
    return 1 if report.bad else 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = ToolParser("verify", __doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=path_or_address, metavar="PATH",
        help="a tar; a folder with train/ and val/, or one of the two; a .beton, a .parquet, or a folder"
        " of either; a file at an address (s3://BUCKET/NAME) is copied into --cache_dir first")  # fmt: skip
    add("--cache_dir", type=path_of, default=Path("data/cache"), metavar="DIR",
        help="of copies: that of training, data.cache_dir (default: %(default)s)")  # fmt: skip
    add("--md5", action="store_true", help="checksum of the official archives (reads all of them)")
    add("--labels", "--val_labels", type=path_of, metavar="FILE",
        help="of images that lie in no class folders (of a flat tar: of validation)")  # fmt: skip
    add("--data_dir", type=path_of, action="append", metavar="DIR",
        help="compare samples of a .beton with this tree or Kaggle layout that it was written from")  # fmt: skip
    add(
        "--tar", type=path_of, metavar="FILE", help="the same with the tar that it was written from"
    )
    add(
        "--parquet",
        type=path_of,
        metavar="DIR",
        help="the same with the shards it was written from",
    )
    add("--imagenet", action="store_true",
        help=f"demand ImageNet's numbers (else from {NEARLY} classes on that are named like its own)")  # fmt: skip
    add("--no_decode", action="store_true", help="do not decode the images")
    add("--num_workers", type=int, metavar="N", default=usable_cores(),
        help="decoding processes (default: all cores)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.num_workers < 1:
        raise UsageError("--num_workers must be at least 1")
    sources = [name for name in ("data_dir", "tar", "parquet") if getattr(options, name)]
    if len(sources) > 1:
        raise UsageError(f"--{sources[0]} and --{sources[1]} exclude each other: give one of them")
    options.paths = [local_path(place, options.cache_dir) for place in options.paths]
    for path in options.paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist")
    return options


@dataclass(frozen=True)
class Target:
    """One thing to check."""

    kind: str  # tar, tree, parquet, beton or archive (the devkit: only its MD5)
    path: Path  # of shards in a folder: FOLDER/SPLIT, which is but their name here
    split: str  # train, val, or "" where the name does not say


def targets(path: Path) -> list[Target]:
    """What there is to check at `path`.

    Raises:
        UsageError: nothing that we know.
    """
    if path.name in ("", ".."):  # of "." and "..": its name and its neighbours are asked for below
        path = path.resolve()
    split = next((s for s in ("train", "val") if re.search(rf"\b{s}|_{s}", path.name)), "")
    if path.is_file():
        if path.suffix in KINDS:
            return [Target(KINDS[path.suffix], path, split)]
        if path.name in MD5:
            return [Target("archive", path, "")]
        raise UsageError(f"{path} is neither a .tar, a .beton nor a .parquet")
    if not path.is_dir():
        raise UsageError(f"{path}: {what_is(path)}")
    if betons := sorted([*path.glob("*.beton"), *path.glob("*.ffcv")]):
        return [target for beton_path in betons for target in targets(beton_path)]
    if shards := [Target("parquet", path / s, s) for s in ("train", "val") if has_shards(path, s)]:
        return shards
    folder = images_of(path) or path
    folders = {split: split_folder(folder, split) for split in FOLDERS}
    found = [Target("tree", place, split) for split, place in folders.items() if place.is_dir()]
    return found or [Target("tree", path, split)]


def has_shards(folder: Path, split: str) -> bool:
    """Whether there are any; that some are missing is for the check to say."""
    with suppress(RunError):
        try:
            shards_of(folder, split)
        except UsageError:
            return False
    return True


def check(target: Target, options: argparse.Namespace, report: Report) -> tuple[str, ...]:
    """Everything about one target; its classes."""
    if target.kind == "archive":
        return ()
    if target.kind == "beton":
        return check_beton(target, options, report)
    # Beside flat validation images the training images mostly lie in folders.
    flat = target.split == "val" or (target.path.is_dir() and is_flat(target.path))
    labels = options.labels if flat else None
    source: ImageSource
    if target.kind == "tar":
        source = open_source(target.split or "val", [], tar=target.path, labels=labels)
    elif target.kind == "parquet":  # one shard may be checked alone
        one = target.path.is_file()
        source = ParquetShards(
            [target.path] if one else shards_of(target.path.parent, target.split)
        )
    else:
        parent, name = target.path.absolute().parent, target.path.name
        source = open_source(name, [parent], labels=labels)
    counts = np.bincount(source.labels, minlength=len(source.classes))
    check_counts(target, source.classes, counts, options.imagenet, report)
    report_empty(target, source.classes, counts, report)
    check_classes(source)
    for remark in [*notes(source), *oddities(source)]:
        report.say("odd", target.path, remark)
    if source.ignored:
        report.say("odd", target.path, f"{source.ignored:,} files are no images by their extension")
    if not options.no_decode:
        check_images(target.path, source, options.num_workers, report)
    return tuple(source.classes)


# --------------------------------------------------------------------------------- the numbers


def check_counts(
    target: Target,
    classes: Sequence[str],
    counts: NDArray[np.int64],
    demanded: bool,
    report: Report,
) -> None:
    """Images and classes, against ImageNet's if it is or should be ImageNet."""
    total, path = int(counts.sum()), target.path
    report.counts[str(path)] = {"images": total, "classes": len(classes)}
    least, most = int(counts.min()), int(counts.max())
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    said = f"{total:,} images of {len(classes):,} classes, {each} each"
    synsets = sum(bool(re.fullmatch(r"n\d{8}", name)) for name in classes)
    if not demanded and synsets < NEARLY:
        report.say("ok", path, said)
        return
    wrong = []
    if len(classes) != CLASSES:
        wrong.append(f"ImageNet has {CLASSES:,} classes")
    if target.split and total != IMAGES[target.split]:
        wrong.append(f"ImageNet has {IMAGES[target.split]:,} {target.split} images")
    if not target.split and total not in IMAGES.values():
        wrong.append("ImageNet has 1,281,167 train and 50,000 val images")
    report.say("BAD" if wrong else "ok", path, "; ".join([said, *wrong]))


def report_empty(
    target: Target, classes: Sequence[str], counts: NDArray[np.int64], report: Report
) -> None:
    """Classes without an image: of the validation set they are absent from the evaluation."""
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if empty:
        level = "odd" if target.split == "val" else "BAD"
        said = f"{len(empty):,} classes have no image, for instance {', '.join(empty[:3])}"
        report.say(level, target.path, said)


def compare_classes(classes: dict[str, tuple[str, ...]], report: Report) -> None:
    """All that was checked must have the same classes in the same order."""
    (first, names), *others = classes.items() or [("", ())]
    for path, found in others:
        if found == names:
            report.say("ok", path, f"the same {len(names):,} classes in the same order as {first}")
        elif odd := sorted(set(found) ^ set(names)):
            report.say("BAD", path, f"{len(odd):,} classes are not in {first} too: {odd[0]}")
        else:
            report.say("BAD", path, f"its classes are in another order than those of {first}")


def compare_divisions(paths: Sequence[Path], report: Report) -> None:
    """Files that --holdout wrote must be sides of one division: images of one may else be in another."""
    manifests = [beton.Manifest.load(beton.manifest_path(path)) for path in paths]
    for path, said in zip(paths[1:], manifests[1:], strict=True):
        if said.divided_otherwise(manifests[0]):
            report.say(
                "BAD",
                path,
                f"it and {paths[0]} are of two divisions by --holdout: images of one may be in the other",
            )


def check_md5(path: Path, report: Report) -> None:
    """MD5 of the file, against the official one where the name is official."""
    digest = hashlib.md5(usedforsecurity=False)
    with (
        path.open("rb") as file,
        Progress(path.stat().st_size >> 20, f"MD5 {path.name}", unit="MiB") as bar,
    ):
        while part := file.read(1 << 22):
            digest.update(part)
            bar.update(len(part) >> 20)
    found, official = digest.hexdigest(), MD5.get(path.name)
    if official is None:
        report.say("ok", path, f"MD5 {found} (no official archive has this name)")
    elif found == official:
        report.say("ok", path, f"MD5 {found} is the official one")
    else:
        report.say("BAD", path, f"MD5 {found}, the official archive's is {official}")


# ---------------------------------------------------------------------------------- the images


@dataclass(frozen=True)
class Look:
    """What decoding one image showed."""

    name: str
    level: str
    what: str


def look_at(part: ImageSource, indices: NDArray[np.int64]) -> list[Look]:
    """Decode the images of `part`; the remarkable ones."""
    found = (look_at_one(part, index) for index in range(len(indices)))
    return [look for look in found if look is not None]


def look_at_one(part: ImageSource, index: int) -> Look | None:
    """Decode one image; None where there is nothing to say."""
    name = part.name(index)
    file = name.rpartition("/")[2]
    try:
        data = part.read(index)[0]
        decode_rgb(data) if isinstance(data, bytes) else data
        image = open_image(bytes(data))
    except (BadImage, OSError) as error:
        return Look(name, "BAD", f"does not decode: {' '.join(str(error).split())}")
    if is_partly_lost(bytes(data)):
        return Look(name, "odd", "is damaged in part: it decodes, with gray or shifted places")
    if image.format != "JPEG" and file.lower().endswith((".jpg", ".jpeg")):
        known = ", as expected in ImageNet" if file in PNG_INSIDE else ""
        return Look(name, "odd", f"is a {image.format}{known}; it is read all the same")
    if image.mode == "CMYK":
        known = ", as expected in ImageNet" if Path(file).stem in CMYK else ""
        return Look(name, "odd", f"has CMYK colours{known}; they are converted")
    return None


def check_images(path: Path, source: ImageSource, num_workers: int, report: Report) -> None:
    """Decode every image, going on where an interrupted check stopped."""
    state = path.with_name(path.name + ".verify.json")
    fingerprint = source.fingerprint()
    done, looks = load_state(state, fingerprint)
    if done:
        print(f"{path}: {done:,} images were checked by an interrupted run", flush=True)
    rest = reading_order(source)[done:]
    saved = time.monotonic()
    try:
        with (
            closing(in_order(source, look_at, num_workers, rest)) as chunks,
            Progress(len(rest), f"decoding {path.name}") as progress,
        ):
            for chunk in chunks:
                looks += chunk
                count = min(CHUNK, len(source) - done)
                done += count
                progress.update(count)
                if time.monotonic() - saved > SAVE_EVERY:
                    save_state(state, fingerprint, done, looks)
                    saved = time.monotonic()
    except BaseException:
        save_state(state, fingerprint, done, looks)
        raise
    for look in looks:
        report.say(look.level, f"{path}/{look.name}", look.what)
    bad = sum(look.level == "BAD" for look in looks)
    if not bad:
        report.say("ok", path, f"all {len(source):,} images decode")
    report.counts[str(path)] |= {"decoded": len(source) - bad, "not decodable": bad}
    state.unlink(missing_ok=True)


def load_state(state: Path, fingerprint: str) -> tuple[int, list[Look]]:
    """How many images were checked, and what was found; nothing if it was of other images."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        said = read_json(state)
        if said["fingerprint"] == fingerprint:
            return int(said["done"]), [Look(**look) for look in said["looks"]]
    return 0, []


def save_state(state: Path, fingerprint: str, done: int, looks: Sequence[Look]) -> None:
    """Whole or not at all; where it cannot be stored, the next check begins anew."""
    said = {"fingerprint": fingerprint, "done": done, "looks": [vars(look) for look in looks]}
    with suppress(NotWritten), atomic_write(state, "w", sync=False) as file:
        json.dump(said, file)


# ----------------------------------------------------------------------------------- the .beton


def check_beton(target: Target, options: argparse.Namespace, report: Report) -> tuple[str, ...]:
    """Manifest, tables, every stored byte, and with a source samples of the pixels."""
    path = target.path
    said = beton.verify_beton(path)
    counts = np.array(said.class_counts)
    target = Target(target.kind, path, said.split)
    # A subset is meant to be smaller than ImageNet, whatever its classes.
    whole = said.settings.get("subset") is None and not said.skipped
    if whole:
        check_counts(target, said.classes, counts, options.imagenet, report)
    else:
        report.counts[str(path)] = {"images": said.samples, "classes": len(said.classes)}
        report.say("ok", path, f"{said.samples:,} images, a part of its source")
    report_empty(target, said.classes, counts, report)
    if said.skipped:
        report.say("odd", path, f"{len(said.skipped):,} unreadable images were left out")
    if beton.content_checksum(path) == said.content_checksum:
        report.say("ok", path, f"it is what its manifest says, {said.content_checksum}")
    else:
        report.say("BAD", path, "its stored bytes are not those in its manifest: write it again")
    if options.data_dir or options.tar or options.parquet:
        compare_samples(path, said, options, report)
    return said.classes


def compare_samples(
    path: Path, said: beton.Manifest, options: argparse.Namespace, report: Report
) -> None:
    """Some images encoded anew from their source: the same bytes, or nearly the same pixels where
    another version of a library encodes otherwise."""
    if said.source.get("kind") == "adopted":
        report.say("odd", path, "it was adopted: how it was stored is not known, nor compared")
        return
    held = said.settings.get("holdout")
    flat = said.split == "val" or said.source.get("kind") == "flat folder"
    labels = options.labels if flat else None
    if held is not None and options.data_dir:
        source = open_undivided(options.data_dir, labels)
    else:
        source = open_source(
            "train" if held is not None else said.split,
            options.data_dir or [],
            tar=options.tar,
            parquet=options.parquet,
            labels=labels,
        )
    named = [field.name for field in dataclasses.fields(PixelSettings)]
    settings = {name: said.settings[name] for name in named if name in said.settings}
    if any(isinstance(value, str) for value in settings.values()):
        report.say("BAD", path, "its manifest's settings are text where numbers must be")
        return
    pixels = PixelSettings(**settings)
    if (count := said.settings.get("subset")) is not None:
        source = source.subset(even_subset(source.labels, len(source.classes), count, pixels.seed))
    if held is not None:
        order = reading_order(source)
        side = hold_out(source, float(held), pixels.seed, options.num_workers, order)
        source = source.subset(np.flatnonzero(side == (said.split == "val")))
    skipped = {entry["path"] for entry in said.skipped}
    numbers = np.array([i for i in range(len(source)) if source.name(i) not in skipped])
    tables = beton.read_tables(path)
    where = options.tar or options.parquet or source.where
    if len(numbers) != len(tables.labels) or tuple(source.classes) != said.classes:
        report.say("BAD", path, f"{where} holds other images or classes")
        return
    if not np.array_equal(source.labels[numbers], tables.labels):
        report.say("BAD", path, f"its labels are not those of {where}")
        return
    chosen = np.random.default_rng(0).choice(
        len(numbers), min(SAMPLES, len(numbers)), replace=False
    )
    same, bad = 0, report.bad
    for index in np.sort(chosen).tolist():
        difference = sample_difference(path, tables, source, index, int(numbers[index]), pixels)
        same += difference == 0
        if difference > NEAR:
            name = source.name(int(numbers[index]))
            report.say("BAD", path, f"sample {index:,} does not show {name} of {where}")
    level = "ok" if report.bad == bad else "BAD"
    report.say(level, path, f"{same} of {len(chosen)} samples equal {where} bit for bit")


def sample_difference(
    path: Path,
    tables: beton.Tables,
    source: ImageSource,
    index: int,
    number: int,
    settings: PixelSettings,
) -> float:
    """Mean absolute difference between a stored image and its source stored anew, 0 for the same
    bytes, infinite where they cannot be compared."""
    with path.open("rb") as file:
        data = beton.read_sample(file, tables, index)
    anew = encode_image(source, number, number, settings, beton.PAGE_SIZE)
    if isinstance(anew, Bad):
        return float("inf")
    if anew.digest == sample_digest(int(tables.labels[index]), data):
        return 0.0
    shape = tuple(int(value[index]) for value in tables.shapes)
    if (anew.mode, anew.height, anew.width) != shape:
        return float("inf")
    try:
        held, wanted = (beton.pixels_of(each, *shape) for each in (data, anew.data))
    except BadImage:
        return float("inf")
    return float(np.abs(held.astype(int) - wanted).mean())

"""The .beton file and the manifest beside it: write, check, verify, put in place.

The layout is ffcv's version 2, so that its Reader and Loader take the file as their own: header,
field descriptors, metadata (one row a sample), pages with the images, allocation table.
"""

import hashlib
import io
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.atomic import (
    NotWritten,
    drop_cached,
    force,
    locked,
    make_folder,
    partial_path,
    rename,
    written,
)
from ffcv_imnet.core.errors import RunError, UsageError, not_written
from ffcv_imnet.core.paths import is_address, open_regular
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.manifest import MANIFEST_FORMAT as MANIFEST_FORMAT
from ffcv_imnet.data.manifest import Manifest as Manifest
from ffcv_imnet.data.manifest import again, command
from ffcv_imnet.data.manifest import manifest_path as manifest_path
from ffcv_imnet.images import Pixels
from ffcv_imnet.images.pixels import BadImage, decode_rgb
from ffcv_imnet.images.stored import PAGE_SIZE, RAW, Stored, checksum, sample_digest

IMAGE_FIELD, INT_FIELD = 2, 1
FIELDS = {  # ffcv.types.TYPE_ID_HANDLER: what a descriptor's type_id says
    0: "FloatField",
    INT_FIELD: "IntField",
    IMAGE_FIELD: "RGBImageField",
    3: "BytesField",
    4: "NDArrayField",
    5: "JSONField",
    6: "TorchTensorField",
    255: "a custom field",
}
MOST_FIELDS = 16  # named in a message
CHOSEN = 64  # samples that are decoded to verify a file
# Of a JPEG, a byte: a block of 8 x 8 pixels takes at least a bit, and the samplings of colour leave at
# least nine blocks in 32 x 32 pixels. What is beyond was not encoded, and would cost memory and time.
MOST_PIXELS = np.uint64(1024)


def adopt_command(*paths: Path, classes: Path | None = None) -> str:
    """The command that makes manifests for files that another program wrote."""
    words = [*paths, "--classes", classes] if classes else paths
    return f"python -m ffcv_imnet adopt {' '.join(shlex.quote(str(word)) for word in words)}"


def check_there(*places: str) -> None:
    """Raises UsageError, as `check_beton` does, unless each is a file or folder of that name, or an address."""
    for place in places:
        if not is_address(place) and not Path(place).exists():
            check_beton(Path(place))


def check_manifests(*paths: Path) -> None:
    """Raises UsageError, with the way to manifests for all of them, where a .beton has none, and as `read_tables` does."""
    lacking = [path for path in paths if path.is_file() and not manifest_path(path).exists()]
    others = [manifest_path(path) for path in paths if manifest_path(path).exists()]
    if lacking:
        read_tables(lacking[0])  # what is no .beton at all needs other advice
        raise UsageError(
            f"{lacking[0]} has no manifest {manifest_path(lacking[0])}: copy the .json from beside"
            " the original to that name, or make it, for a file of any writer, with"
            f" `{adopt_command(*lacking, classes=others[0] if others else None)}`"
        )


# --------------------------------------------------------------------------------- the layout


# ffcv.types as of ffcv 1.0.2, spelled out: importing it brings torch and numba, seconds and 600 MB,
# for a dozen field sizes. A test compares every one of them with ffcv's own.
VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
DESCRIPTOR = np.dtype(
    [("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True
)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])


def _metadata_type(fields: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
    """A row of the metadata: f0, f1 and so on, as ffcv aligns them."""
    return np.dtype([("", field) for field in fields], align=True)


METADATA = _metadata_type([IMAGE, np.dtype("<i8")])  # f0: image, f1: label
DESCRIPTORS = np.zeros(2, DESCRIPTOR)  # of our two fields
DESCRIPTORS["type_id"] = IMAGE_FIELD, INT_FIELD
DESCRIPTORS["name"][:, :5] = [list(b"image"), list(b"label")]


class BetonWriter:
    """Writes samples into an open, empty file. `finish` makes it a valid .beton.

    Until then the header's pointer to the allocation table is 0, by which `check_beton` knows a
    file that was cut short.

    Args:
        file: seekable, opened for writing in binary.
        capacity: most samples that will come; room for their metadata is left in front.
        page_size: in bytes, a power of two.
    """

    def __init__(self, file: IO[bytes], capacity: int, page_size: int = PAGE_SIZE) -> None:
        self.file, self.page_size, self.samples = file, page_size, 0
        self.metadata = np.zeros(capacity, METADATA)
        self.allocations = np.zeros(capacity, ALLOCATION)
        self.header = np.zeros((), HEADER)
        self.header["version"] = VERSION
        self.header["num_fields"] = len(DESCRIPTORS)
        self.header["page_size"] = page_size
        file.write(self.header.tobytes() + DESCRIPTORS.tobytes())
        front = file.tell() + self.metadata.nbytes
        self.end = -(-front // page_size) * page_size  # pages are aligned in the file
        file.seek(self.end)

    def add(self, sample: Stored, index: int | None = None) -> None:
        """Append one sample, whose data must fit a page, as number `index` (default: the next).

        Numbers that never come are closed up by `finish`.
        """
        index = self.samples if index is None else index
        size = len(sample.data)
        if self.end % self.page_size + size > self.page_size:
            self.end += -self.end % self.page_size
            self.file.seek(self.end)  # leaves a hole of zeros
        row = self.metadata[index]
        row["f0"] = (sample.mode, sample.width, sample.height, self.end)
        row["f1"] = sample.label
        self.allocations[index] = (index, self.end, size)
        self.file.write(sample.data)
        self.end += size
        self.samples += 1

    def finish(self) -> str:
        """Write the tables, force the file to the disk, set the pointer; the tables' checksum."""
        written = self.allocations["size"] > 0
        self.metadata = _rows(self.metadata, written)
        self.allocations = _rows(self.allocations, written)
        self.allocations["sample_id"] = np.arange(self.samples)
        self.file.write(self.allocations.tobytes())
        self.header["num_samples"] = self.samples
        descriptors = DESCRIPTORS.tobytes()
        self.file.seek(self.header.nbytes + len(descriptors))
        self.file.write(self.metadata.tobytes())
        # The pointer last, when all that it vouches for is on the disk.
        force(self.file)
        self.header["alloc_table_ptr"] = self.end
        self.file.seek(0)
        self.file.write(self.header.tobytes())
        force(self.file)
        return checksum(self.header, descriptors, self.metadata, self.allocations)


def _rows(table: NDArray[Any], chosen: NDArray[np.bool_]) -> NDArray[Any]:
    # As bytes: numpy does not copy what lies between aligned fields, and the file must not depend
    # on what lay in memory.
    rows = table.view(np.uint8).reshape(len(table), table.itemsize)[chosen]
    return rows.reshape(-1).view(table.dtype)


# ------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Tables:
    """The tables of a .beton, (samples,) each, in index order."""

    labels: NDArray[np.int64]
    modes: NDArray[np.uint8]  # 0 JPEG, 1 raw
    heights: NDArray[np.uint16]
    widths: NDArray[np.uint16]
    pointers: NDArray[np.uint64]  # offset of the stored bytes in the file
    sizes: NDArray[np.uint64]
    start: int  # end of the metadata: no image begins before
    end: int  # start of the allocation table
    page_size: int
    checksum: str

    @property
    def shapes(self) -> tuple[NDArray[Any], ...]:
        """Modes, heights and widths, as `pixels_of` takes those of one sample."""
        return self.modes, self.heights, self.widths


def read_tables(path: Path) -> Tables:
    """Header and tables of a .beton of one image and one integer; none of its images is read.

    Raises:
        UsageError: there is no such file, it is not a .beton, or has other fields.
        RunError: it is half-written, truncated or damaged.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        unfinished = partial_path(path).exists()
        also = f" (only an unfinished {partial_path(path).name})" if unfinished else ""
        raise UsageError(f"{path} does not exist{also}: {command(path)}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: name the .beton in it, or {command(path)}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        try:
            header = _read_header(path, file, size)
        except (RunError, UsageError):  # said of it is what it would mean in a sound file
            if _said_bytes(path) != size:
                raise
            raise RunError(
                f"the header of {path} is damaged, the file has the size that its manifest says: {again(path)}"
            ) from None
        pointer, samples = int(header["alloc_table_ptr"]), int(header["num_samples"])
        fields = _read_fields(path, file, int(header["num_fields"]))
        metadata = np.frombuffer(file.read(samples * fields.row.itemsize), fields.row)
        start = file.tell()
        file.seek(pointer)
        allocations = np.frombuffer(file.read(), ALLOCATION)
    if len(metadata) != samples or len(allocations) != samples or start > pointer:
        raise RunError(
            f"{path} is damaged, its tables do not hold its {samples:,} samples: {again(path)}"
        )
    # ffcv's own writer lists them as its workers finish.
    by_sample = allocations[np.argsort(allocations["sample_id"], kind="stable")]
    image = metadata[fields.image]
    if not np.array_equal(by_sample["sample_id"], np.arange(samples)) or not np.array_equal(
        by_sample["ptr"], image["data_ptr"]
    ):
        raise RunError(
            f"{path} is damaged, its two tables place its samples differently: {again(path)}"
        )
    return Tables(
        labels=metadata[fields.label],
        modes=image["mode"],
        heights=image["height"],
        widths=image["width"],
        pointers=image["data_ptr"],
        sizes=by_sample["size"],
        start=start,
        end=pointer,
        page_size=int(header["page_size"]),
        checksum=checksum(header, fields.descriptors, metadata, allocations),
    )


@dataclass(frozen=True)
class _Fields:
    """Which columns of the metadata are the image and the label, whatever they are called."""

    descriptors: bytes
    row: np.dtype[Any]
    image: str  # f0 or f1
    label: str


def _read_fields(path: Path, file: IO[bytes], count: int) -> _Fields:
    """The field descriptors, at which `file` stands.

    Raises:
        UsageError: they are not one image and one integer under two names.
    """
    size = DESCRIPTOR.itemsize
    data = file.read(min(count, MOST_FIELDS) * size)
    rows = np.frombuffer(data[: len(data) // size * size], DESCRIPTOR)
    types = [int(row["type_id"]) for row in rows]
    names = [bytes(row["name"]).split(b"\0")[0].decode("ascii", "replace") for row in rows]
    if not all(bytes(row["name"]).isascii() for row in rows):  # ffcv would raise
        raise RunError(f"{path} is damaged, the names of its fields are not ASCII: {again(path)}")
    if count != 2 or sorted(types) != [INT_FIELD, IMAGE_FIELD] or names[0] == names[1]:
        held = [f"{n!r} ({FIELDS.get(t, 'unknown')})" for n, t in zip(names, types, strict=True)]
        raise UsageError(
            f"{path} has {count} fields, {', '.join(held)}: one image (RGBImageField) and one class"
            " (IntField) can be trained on, whatever their names; write it again with these two"
        )
    place = {type_id: f"f{number}" for number, type_id in enumerate(types)}
    return _Fields(
        descriptors=data,
        row=_metadata_type([IMAGE if t == IMAGE_FIELD else np.dtype("<i8") for t in types]),
        image=place[IMAGE_FIELD],
        label=place[INT_FIELD],
    )


def _read_header(path: Path, file: IO[bytes], size: int) -> NDArray[Any]:
    data = file.read(HEADER.itemsize)
    if len(data) < HEADER.itemsize:
        raise RunError(f"{path} is not a .beton, it has only {len(data)} bytes: {again(path)}")
    header = np.frombuffer(data, HEADER)[0]
    page_size = int(header["page_size"])
    if header["version"] != VERSION or page_size == 0 or page_size & (page_size - 1):
        raise UsageError(
            f"{path} is not a .beton of version {VERSION}: name one that write_ffcv.py wrote"
        )
    pointer = int(header["alloc_table_ptr"])
    if pointer == 0:
        raise RunError(f"{path} is half-written, its writer did not finish: {again(path)}")
    samples = int(header["num_samples"])
    if (expected := pointer + samples * ALLOCATION.itemsize) != size:
        raise RunError(
            f"{path} is {'truncated' if size < expected else 'too long'}: it has {size:,} bytes and"
            f" its header says {expected:,}: {again(path)}"
        )
    return header


def _said_bytes(path: Path) -> int | None:
    """The size in the manifest, None where there is none to be read."""
    with suppress(RunError, UsageError):
        return Manifest.load(manifest_path(path)).bytes
    return None


def check_beton(path: Path, manifest: Path | None = None) -> Manifest:
    """Refuse a .beton that is not what its manifest says, without reading its images.

    Reads the tables only (48 bytes a sample, 60 MB for ImageNet): file size, header, SHA-256 of
    the tables, every entry of them, number of samples and classes. A manifest is as easily forged
    as a table: whatever passes here may be mapped and its labels trained on. Changed pixels are
    left to `verify_beton` and to the decoder.

    Args:
        path: the .beton.
        manifest: its manifest, where that is not beside it.

    Raises:
        UsageError: .beton or manifest is missing; the message has the command that writes it.
        RunError: either is damaged, half-written, or they do not belong together.
    """
    manifest = manifest or manifest_path(path)
    tables = read_tables(path)
    if manifest == manifest_path(path):
        check_manifests(path)
    said = Manifest.load(manifest)
    size = path.stat().st_size
    if size != said.bytes:
        raise RunError(
            f"{path} has {size:,} bytes and its manifest {manifest} says {said.bytes:,}:"
            f" {again(path)}"
        )
    if tables.checksum != said.tables_checksum:
        raise RunError(
            f"the header or tables of {path} are not those in its manifest {manifest},"
            f" one of the two was changed or replaced: {again(path)}"
        )
    verify_tables(path, tables, len(said.classes))
    # The checksum vouches for the tables, not for the manifest's own lists.
    counts = np.bincount(tables.labels, minlength=len(said.classes))
    if said.samples != len(tables.labels) or list(said.class_counts) != counts.tolist():
        raise RunError(
            f"the manifest {manifest} does not count the samples that {path} holds: {again(path)}"
        )
    return said


def verify_beton(
    path: Path, expected: Mapping[int, bytes] | None = None, manifest: Path | None = None
) -> Manifest:
    """`check_beton`, then the stored bytes and pixels of some samples.

    Args:
        path: the .beton.
        expected: digests (see `sample_digest`) that samples must have, by index. They are what is
            read again from the disk; without them, a seeded choice of `CHOSEN` is only decoded.
        manifest: the manifest, where it is not beside the .beton.

    Raises:
        UsageError, RunError: as `check_beton`, and RunError that names the first sample at fault.
    """
    said = check_beton(path, manifest)
    tables = read_tables(path)
    if expected is None:
        count = min(CHOSEN, len(tables.labels))
        chosen = np.random.default_rng(0).choice(len(tables.labels), count, replace=False)
    else:
        chosen = np.array(sorted(expected), dtype=np.int64)
    with path.open("rb") as file:
        for index in np.sort(chosen).tolist():
            if expected:
                drop_cached(file, int(tables.pointers[index]), int(tables.sizes[index]))
            data = read_sample(file, tables, index)
            if expected and sample_digest(int(tables.labels[index]), data) != expected[index]:
                raise RunError(
                    f"sample {index:,} of {path} is not what was to be stored there"
                    f" (a failing disk?): {again(path)}"
                )
            if fault := fault_of_pixels(data, *(int(value[index]) for value in tables.shapes)):
                raise RunError(f"sample {index:,} of {path} {fault}: {again(path)}")
    return said


def verify_tables(path: Path, tables: Tables, classes: int) -> None:
    """Refuse any entry that the writer could not have written; 0.1 s for a million.

    Raises:
        RunError: names the first sample at fault.
    """
    pointers, sizes = tables.pointers, tables.sizes  # unsigned: sums of forged ones may overflow
    start, end = np.uint64(tables.start), np.uint64(tables.end)
    within = (start <= pointers) & (pointers < end)
    within &= sizes <= end - np.where(within, pointers, end)
    _refuse(path, ~within, "lies outside the data")
    pixels = tables.heights.astype(np.uint64) * tables.widths
    _refuse(path, (sizes == 0) | (pixels == 0), "is empty")
    last = pointers + sizes - np.uint64(1)
    page = np.uint64(tables.page_size.bit_length() - 1)
    _refuse(path, pointers >> page != last >> page, "crosses a page")
    by_place = np.argsort(pointers, kind="stable")
    overlaps = np.zeros(len(pointers), bool)
    overlaps[by_place[1:]] = pointers[by_place[1:]] <= last[by_place[:-1]]
    _refuse(path, overlaps, "overlaps the one before")
    labels, raw = tables.labels, tables.modes == RAW
    _refuse(path, (labels < 0) | (labels >= classes), "has a label out of range")
    _refuse(path, tables.modes > RAW, "has an unknown storage mode")
    _refuse(path, raw & (sizes != 3 * pixels), "has a size that is not height x width x 3")
    _refuse(path, ~raw & (pixels > sizes * MOST_PIXELS), "has too many pixels for its bytes")


def _refuse(path: Path, where: NDArray[np.bool_], fault: str) -> None:
    if where.any():
        raise RunError(f"sample {int(np.argmax(where)):,} of {path} {fault}: {again(path)}")


def read_sample(file: IO[bytes], tables: Tables, index: int) -> bytes:
    """The stored bytes of sample `index`."""
    file.seek(int(tables.pointers[index]))
    return file.read(int(tables.sizes[index]))


def read_image(path: Path, tables: Tables, index: int) -> Pixels:
    """The stored image `index`, (height, width, 3) uint8 RGB. Raises BadImage."""
    with path.open("rb") as file:
        data = read_sample(file, tables, index)
    return pixels_of(data, *(int(value[index]) for value in tables.shapes))


def pixels_of(data: bytes, mode: int, height: int, width: int) -> Pixels:
    """Stored bytes as (height, width, 3) uint8 RGB. Raises BadImage."""
    if mode == RAW:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    return decode_rgb(data)  # not OpenCV, whose libjpeg prints a line of its own


def fault_of_pixels(data: bytes, mode: int, height: int, width: int) -> str:
    """What keeps stored bytes from being such an image, to follow its name; empty if nothing does."""
    if mode == RAW:
        return ""  # its size was compared with height x width x 3
    try:
        found = decode_rgb(data).shape[:2]
    except BadImage as bad:
        return f"does not decode ({bad})"
    if found != (height, width):
        return f"is {found[1]} x {found[0]} pixels, said to be {width} x {height}"
    return ""


def content_checksum(path: Path) -> str:
    """The content checksum computed afresh from the file, reading all of it."""
    tables = read_tables(path)
    digest = hashlib.sha256()
    with (
        io.BufferedReader(path.open("rb", buffering=0), 1 << 20) as file,
        Progress(len(tables.labels), f"checksum of {path.name}") as progress,
    ):
        for index, label in enumerate(tables.labels.tolist()):
            digest.update(sample_digest(label, read_sample(file, tables, index)))
            progress.update(1)
    return f"sha256:{digest.hexdigest()}"


# -------------------------------------------------------------------------- putting in place


@contextmanager
def partial_file(path: Path) -> Iterator[IO[bytes]]:
    """`path` open for writing under its temporary name, which is removed if anything goes wrong.

    Raises:
        UsageError: it cannot be created, or another process is writing it.
        NotWritten: writing fails, for instance because the disk is full.
    """
    partial = partial_path(path)
    try:
        make_folder(path.parent)
        file = partial.open("ab", buffering=0)
    except OSError as error:
        raise UsageError(not_written(path, error)) from None
    with file:
        if not locked(file):
            raise UsageError(f"another write_ffcv.py is writing {path}")
        try:
            with written(path) as out:  # without what a killed run left
                yield out
        except BaseException:
            partial_path(manifest_path(path)).unlink(missing_ok=True)
            raise


def commit_beton(path: Path) -> None:
    """Rename the verified partial .beton, then its partial manifest, to their final names.

    A stop between the two leaves a new .beton beside no manifest or an old one, and the new one
    under its partial name: `repair_beton` sees that they match and finishes the work. Where the first
    is refused (in a sticky folder what bears the name may be another user's) both are removed.
    """
    partial, waiting = partial_path(path), partial_path(manifest_path(path))
    try:
        rename(partial, path)
    except NotWritten:
        if partial.exists():  # else it has its name, and the folder was not forced
            with suppress(OSError):
                partial.unlink()
                waiting.unlink()
        raise
    rename(waiting, manifest_path(path))


def repair_beton(path: Path) -> bool:
    """Finish a `commit_beton` that was stopped half-way; True if there was one."""
    waiting = partial_path(manifest_path(path))
    if not path.exists() or not waiting.exists():
        return False
    try:
        check_beton(path, waiting)
    except (RunError, UsageError):
        return False  # a left-over of a writer that got no further; the next one overwrites it
    rename(waiting, manifest_path(path))
    return True

"""ImageNet's tars read in place: where each image lies, found in one pass over the headers.

The training archive is a tar of one uncompressed tar a class, the validation archive is flat; in
either every image has a byte offset in the one file. Python's tarfile builds an object a member,
thirty times slower and a gigabyte for ImageNet, so the headers are read here.

Format: https://www.gnu.org/software/tar/manual/html_node/Standard.html (ustar, GNU) and
https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html (pax).
"""

import os
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.atomic import NotWritten, atomic_write
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.paths import open_regular
from ffcv_imnet.images import InArrays
from ffcv_imnet.images.folder import EXTENSIONS
from ffcv_imnet.images.labels import all_labelled, labels_of
from ffcv_imnet.images.stored import checksum

BLOCK = 512  # bytes: headers lie on this boundary
BATCH = 4096  # headers checked at a time: 2 MB
END = bytes(BLOCK)
RECORD = 20 * BLOCK  # filled up with zeros; the two blocks of the end may lie in two records
TAIL = 1 << 20  # zeros that may follow the end of the file's own tar
LARGEST_HEADER = 1 << 16  # bytes of a GNU or pax header that are read
LONGEST_NAME = 512  # bytes; the index gives every name the room of the longest
FORMAT = 1  # of the cached index
SPOT_CHECKS = 32  # headers read again when a cached index is loaded
FOREIGN = {  # what some downloads are instead, by their first bytes
    b"\x1f\x8b": "compressed by gzip: unpack it with gunzip first",
    b"PK\x03\x04": "a zip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it with bunzip2 first",
    b"\xfd7zXZ": "compressed by xz: unpack it with unxz first",
    b"<": "a web page, so the download failed (not logged in?)",
}
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"M": "a part of a multi-volume archive",
}


# ----------------------------------------------------------------------------------- one archive


class _Stop(Exception):
    """The archive is truncated or damaged here; what came before is good."""


@dataclass
class Scan:
    """The regular files of one tar, in its order, and how far it is good."""

    names: NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, "S1"))
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    good: int = 0  # first byte after the last whole member
    fault: str = ""  # what is wrong there; empty where the archive's end was found

    def chosen(self, where: NDArray[np.bool_] | NDArray[np.int64]) -> "Scan":
        """These members alone."""
        return replace(
            self, names=self.names[where], offsets=self.offsets[where], sizes=self.sizes[where]
        )

    @staticmethod
    def joined(parts: "Sequence[Scan]") -> "Scan":
        """The members of all parts."""
        parts = parts or [Scan()]
        return Scan(
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.offsets for part in parts]),
            np.concatenate([part.sizes for part in parts]),
        )


def scan_tar(descriptor: int, where: str, start: int, end: int, outer: bool) -> Scan:
    """List the members of the tar in bytes [start, end) of an open file.

    Args:
        descriptor: of the file.
        where: what messages call this tar.
        start, end: its place.
        outer: it is the file itself. A member that reaches beyond the end is then the sign of a
            download cut short, in an inner tar it is forged; and the file must have an end mark.

    Raises:
        RunError: a member that no data set has and that could do harm; the message names it.
    """
    scan = _Scanner(where)
    position = start
    read, block_size = os.pread, BLOCK
    fault = ""
    try:
        while True:
            header = read(descriptor, block_size, position) if position + BLOCK <= end else b""
            if len(header) < block_size:
                if outer or position != end:
                    raise _Stop("it ends without an end mark")
                break
            if header == END:
                _check_tail(descriptor, position, end, TAIL if outer else RECORD + BLOCK)
                break
            digits = header[124:135]
            # int() alone would take a sign, spaces and underscores: a negative size never ends.
            plain = digits.isdigit() and header[156] in b"0\0" and not scan.pending
            if plain and header[135] in b"\0 ":
                try:
                    size = int(digits, 8)
                except ValueError:
                    raise _Stop(f"the header at byte {position:,} is damaged") from None
                data = position + block_size
                position = data + (size + 511 & -512)
                scan.add(header, data, size)
            else:
                position = scan.special(descriptor, header, position, end)
            if position > end:
                scan.cut(end, outer)
        scan.flush()
    except _Stop as stop:
        with suppress(_Stop):  # a fault further in front comes first
            scan.flush()
            scan.fault = str(stop)
        fault = scan.fault
    found = Scan.joined(scan.parts)
    good = int(found.offsets[-1] + (found.sizes[-1] + 511 & -512)) if len(found.sizes) else start
    return replace(found, fault=fault, good=good)


def _check_tail(descriptor: int, position: int, end: int, most: int) -> None:
    # A download that reserved its space and stopped is full of zeros, which look like an end.
    if end - position > most:
        raise _Stop(f"an end mark stands {end - position:,} bytes before the end")
    if os.pread(descriptor, end - position, position).strip(b"\0"):
        raise _Stop("something follows its end mark")


class _Scanner:
    """Headers are collected and checked many at a time, because 1.28 million single checks in
    Python would take longer than reading them."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.headers: list[bytes] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.long_names: dict[int, bytes] = {}  # by row of the batch
        self.pending: dict[str, bytes] = {}  # what a GNU or pax header says of the next member
        self.parts: list[Scan] = []
        self.fault = ""

    def add(self, header: bytes, data: int, size: int) -> None:
        """One regular file, whose `size` bytes begin at `data`."""
        if len(self.headers) >= BATCH:  # before and not after: `cut` may take the newest back
            self.flush()
        self.headers.append(header)
        self.offsets.append(data)
        self.sizes.append(size)

    def flush(self) -> None:
        """Check what was collected. Raises _Stop at the first damaged header."""
        if not self.headers:
            return
        blocks = np.frombuffer(b"".join(self.headers), np.uint8).reshape(-1, BLOCK)
        whole = _checksums_match(blocks)
        good = len(blocks) if whole.all() else int(np.argmin(whole))
        at = self.offsets[good] - BLOCK if good < len(blocks) else 0
        if good:
            names = self._names(blocks[:good])
            offsets = np.array(self.offsets[:good], np.int64)
            sizes = np.array(self.sizes[:good], np.int64)
            folders = np.strings.endswith(names, b"/")  # how tars before 1988 mark them
            self.parts.append(Scan(names, offsets, sizes).chosen(~folders))
        self.headers, self.offsets, self.sizes, self.long_names = [], [], [], {}
        if good < len(blocks):
            self.fault = f"the header at byte {at:,} is damaged"
            raise _Stop(self.fault)

    def _names(self, blocks: NDArray[np.uint8]) -> NDArray[np.bytes_]:
        raw = blocks[:, :100]
        # Only what is odd is looked at one by one: a field not filled up with zeros, a prefix, a
        # place outside, a long name.
        odd = ((raw[:, :-1] == 0) & (raw[:, 1:] != 0)).any(axis=1)
        odd |= (blocks[:, 257:263] == np.frombuffer(b"ustar\0", np.uint8)).all(axis=1) & (
            blocks[:, 345] != 0
        )
        odd |= ((raw[:, :-1] == ord(".")) & (raw[:, 1:] == ord("."))).any(axis=1)
        odd |= np.isin(raw[:, 0], (0, ord("/"), ord(".")))
        rows = sorted({*np.flatnonzero(odd).tolist(), *self.long_names})
        rows = [row for row in rows if row < len(blocks)]
        special = {
            row: safe_name(self.long_names.get(row) or _short_name(bytes(blocks[row])), self.where)
            for row in rows
        }
        names = np.ascontiguousarray(raw).view("S100").reshape(-1)
        longest = max([1, int(np.strings.str_len(names).max()), *map(len, special.values())])
        names = names.astype(f"S{longest}")
        for row, name in special.items():
            names[row] = name
        return names

    def special(self, descriptor: int, header: bytes, position: int, end: int) -> int:
        """A header that is not that of an ordinary file; the position of the next one."""
        if not _checksums_match(np.frombuffer(header, np.uint8).reshape(1, BLOCK))[0]:
            raise _Stop(f"the header at byte {position:,} is damaged")
        kind, name = header[156:157], self.pending.get("path") or _short_name(header)
        size = _number(header[124:136], position)
        data = position + BLOCK
        if kind in b"LKxg" and kind:
            if size > LARGEST_HEADER:
                raise RunError(f"{self.where}: the name of a member takes {size:,} bytes: refused")
            if data + size > end:
                raise _Stop("it ends inside a header")
            self._note(kind, os.pread(descriptor, size, data))
            return data + (size + 511 & -512)
        size = _decimal(self.pending["size"], position) if "size" in self.pending else size
        if kind in (b"0", b"\0", b"7"):
            self.pending = {}
            self.add(header, data, size)
            self.long_names[len(self.headers) - 1] = name
            return data + (size + 511 & -512)
        self.pending = {}
        said = os.fsdecode(safe_name(name, self.where))
        if kind in b"5V":  # a folder or the archive's own label: nothing to read
            return data
        what = REFUSED.get(kind, f"of the unknown type {kind!r}")
        raise RunError(f"{self.where}: the member {said!r} is {what}: refused")

    def _note(self, kind: bytes, text: bytes) -> None:
        if kind == b"L":
            self.pending["path"] = text.rstrip(b"\0")
        elif kind in b"xg":
            said = _pax_records(text, self.where)
            if any(key.startswith("GNU.sparse") for key in said):
                raise RunError(f"{self.where}: it has a sparse file: refused")
            if kind == b"x":
                self.pending |= {key: said[key] for key in ("path", "size") if key in said}
            elif {"path", "size"} & set(said):
                raise RunError(f"{self.where}: a global header renames its members: refused")

    def cut(self, end: int, outer: bool) -> None:
        """The member added last reaches beyond `end`. Raises _Stop, or RunError in an inner tar."""
        header, data, size = self.headers.pop(), self.offsets.pop(), self.sizes.pop()
        name = self.long_names.pop(len(self.headers), b"") or _short_name(header)
        self.flush()
        if not _checksums_match(np.frombuffer(header, np.uint8).reshape(1, BLOCK))[0]:
            raise _Stop(f"the header at byte {data - BLOCK:,} is damaged")
        said = f"the member {os.fsdecode(safe_name(name, self.where))!r} claims {size:,} bytes"
        if not outer:
            raise RunError(f"{self.where}: {said}, more than the archive that it is in: refused")
        raise _Stop(f"{said} of which {max(0, end - data):,} are there")


def _checksums_match(blocks: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n, 512) headers: whether each one's sum of bytes, its own field as spaces, is what it says."""
    own = blocks[:, 148:156]
    said = np.zeros(len(blocks), np.int64)
    for column in own.T:
        digit = (column >= ord("0")) & (column <= ord("7"))
        said = np.where(digit, said * 8 + column - ord("0"), said)
    total = blocks.sum(axis=1, dtype=np.int64) - own.sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    return total == said


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(text: bytes, position: int) -> int:
    """A size: octal, or since GNU tar 1.13 binary behind a first byte of 128."""
    if text[0] == 128:  # (255: a negative one)
        return int.from_bytes(text[1:], "big")
    digits = text.split(b"\0", 1)[0].strip(b" ") or b"0"
    if digits.strip(b"01234567"):
        raise _Stop(f"the header at byte {position:,} is damaged")
    return int(digits, 8)


def _decimal(text: bytes, position: int) -> int:
    if not text.isdigit() or len(text) > 20:
        raise _Stop(f"the header at byte {position:,} is damaged")
    return int(text)


def _pax_records(text: bytes, where: str) -> dict[str, bytes]:
    """`LENGTH KEY=VALUE\\n` records. Raises RunError where they do not parse."""
    said = {}
    while text:
        length, _, rest = text.partition(b" ")
        if (
            not length.isdigit()
            or len(length) > 6
            or not len(length) + 2 < int(length) <= len(text)
        ):
            raise RunError(f"{where}: it has a damaged pax header")
        key, _, value = rest[: int(length) - len(length) - 1].removesuffix(b"\n").partition(b"=")
        said[key.decode("utf-8", "replace")] = value
        text = text[int(length) :]
    return said


def safe_name(name: bytes, where: str) -> bytes:
    """A member's name relative to where it would be unpacked, without `./`.

    Raises:
        RunError: it would lie elsewhere, or is no name.
    """
    if len(name) > LONGEST_NAME:
        raise RunError(f"{where}: the name of a member has {len(name):,} bytes: refused")
    parts = name.split(b"/")
    shown = os.fsdecode(name)
    if name.startswith(b"/"):
        raise RunError(f"{where}: the member {shown!r} has an absolute path: refused")
    if b".." in parts:
        raise RunError(f"{where}: the member {shown!r} has '..' in its path: refused")
    kept = b"/".join(part for part in parts if part not in (b"", b"."))
    if (not kept and name.strip(b"./")) or not name or b"\0" in name:
        raise RunError(f"{where}: a member has no usable name ({shown!r}): refused")
    return kept + (b"/" if name.endswith((b"/", b"/.")) or name == b"." else b"")


# ------------------------------------------------------------------------------------- the index


@dataclass(frozen=True)
class TarIndex:
    """Where the images of an archive lie, sorted by class and name; (images,) each."""

    classes: NDArray[np.bytes_]  # sorted names of the inner tars, empty if it has none
    counts: NDArray[np.int64]  # images of each class; one number where there are no inner tars
    names: NDArray[np.bytes_]  # inside the class
    offsets: NDArray[np.int64]  # of the first byte, in the file
    sizes: NDArray[np.int64]  # in bytes
    ignored: int = 0  # members that are no images by their extension
    good: int = 0  # bytes up to the end of the last whole member
    fault: str = ""  # why the index ends there; empty where the archive is whole


def index_tar(path: Path) -> TarIndex:
    """Index the archive at `path` in one pass, or take the index cached beside it.

    The cache, `PATH.index.npz`, holds for the size and time of the archive that it was made from;
    one that is damaged or does not fit is made again, one that cannot be stored is done without.

    Raises:
        UsageError: there is no such file, or it is not a tar.
        RunError: a member is refused; see `scan_tar`.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        descriptor = file.fileno()
        state = os.fstat(descriptor)
        _check_is_tar(descriptor, path, state.st_size)
        key = np.array([FORMAT, state.st_size, state.st_mtime_ns], np.int64)
        cache = path.with_name(path.name + ".index.npz")
        index = _load(cache, key, descriptor)
        if index is None:
            index = _index(descriptor, path, state.st_size)
            if not index.fault:
                _save(cache, key, index)
        return index


def _check_is_tar(descriptor: int, path: Path, size: int) -> None:
    try:
        first = os.pread(descriptor, BLOCK, 0)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    for magic, what in FOREIGN.items():
        if first.startswith(magic):
            raise UsageError(f"{path} is {what}")
    blocks = np.frombuffer(first.ljust(BLOCK, b"\0"), np.uint8).reshape(1, BLOCK)
    if size < BLOCK or not first.strip(b"\0") or not _checksums_match(blocks)[0]:
        raise UsageError(f"{path} is not a tar archive")


def _index(descriptor: int, path: Path, size: int) -> TarIndex:
    outer = scan_tar(descriptor, str(path), 0, size, outer=True)
    inner = np.strings.endswith(outer.names, b".tar")
    faults = [outer.fault] if outer.fault else []
    if inner.any():
        found, members = _scan_inner(descriptor, path, outer.chosen(inner), faults)
        members += int((~inner).sum())
    else:
        found, members = {b"": _images(outer, str(path))}, len(outer.names)
    classes = sorted(found)
    images = Scan.joined([found[name] for name in classes])
    return TarIndex(
        classes=np.array([name for name in classes if name], np.bytes_),
        counts=np.array([len(found[name].names) for name in classes] or [0]),
        names=images.names,
        offsets=images.offsets,
        sizes=images.sizes,
        ignored=members - len(images.names),
        good=outer.good,
        fault="; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if faults[3:] else ""),
    )


def _scan_inner(
    descriptor: int, path: Path, tars: Scan, faults: list[str]
) -> tuple[dict[bytes, Scan], int]:
    """Each class's images, and the number of all members; what is wrong with a tar joins `faults`."""
    found: dict[bytes, Scan] = {}
    members = 0
    for name, start, size in zip(
        tars.names.tolist(), tars.offsets.tolist(), tars.sizes.tolist(), strict=True
    ):
        where = f"{path}: {os.fsdecode(name)}"
        wnid = name.rpartition(b"/")[2].removesuffix(b".tar")
        if wnid in found or not wnid:
            raise RunError(f"{path}: the member {os.fsdecode(name)!r} is there twice: refused")
        scan = scan_tar(descriptor, where, start, start + size, outer=False)
        if scan.fault:
            faults.append(f"{os.fsdecode(name)}: {scan.fault}")
            continue
        found[wnid] = _images(scan, where)
        members += len(scan.names)
    if empty := sorted(name for name, scan in found.items() if not len(scan.names)):
        raise RunError(f"{path}: {os.fsdecode(empty[0])}.tar holds no image")
    return found, members


def _images(scan: Scan, where: str) -> Scan:
    """The images among the members, in the order of an ImageFolder tree.

    Raises:
        RunError: two members have one name.
    """
    order = np.argsort(scan.names, kind="stable")
    names = scan.names[order]
    twice = names[1:] == names[:-1]
    if twice.any():
        name = os.fsdecode(bytes(names[int(np.argmax(twice))]))
        raise RunError(f"{where}: the member {name!r} is there twice: refused")
    if (np.strings.find(names, b"/") >= 0).any():  # sorted by folder first, as a walk of the tree
        keys = [(folder, file) for folder, _, file in (n.rpartition(b"/") for n in names.tolist())]
        order = order[sorted(range(len(keys)), key=keys.__getitem__)]
        names = scan.names[order]
    lower = np.strings.lower(names)
    image = np.zeros(len(names), bool)
    for extension in EXTENSIONS:
        image |= np.strings.endswith(lower, extension)
    return scan.chosen(order[image])


def _save(cache: Path, key: NDArray[np.int64], index: TarIndex) -> None:
    arrays = {f.name: np.asarray(getattr(index, f.name)) for f in fields(TarIndex)}
    # Where the folder is read-only or full, the next run reads the headers again.
    with suppress(NotWritten), atomic_write(cache, shared=True) as file:
        np.savez(file, allow_pickle=False, key=key, **arrays)


def _load(cache: Path, key: NDArray[np.int64], descriptor: int) -> TarIndex | None:
    """The cached index, or None if it is missing, damaged, of another archive or of another time."""
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as held:
            if not np.array_equal(held["key"], key):
                return None
            arrays = {f.name: held[f.name] for f in fields(TarIndex)}
        index = TarIndex(
            **{
                name: array[()].item() if array.ndim == 0 else array
                for name, array in arrays.items()
            }
        )
        return index if _fits(index, int(key[1]), descriptor) else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, MemoryError):
        return None


def _fits(index: TarIndex, size: int, descriptor: int) -> bool:
    """Whether the arrays agree with each other and with some headers of the archive."""
    count = len(index.names)
    tables = [
        index.names.shape == index.offsets.shape == index.sizes.shape == (count,),
        index.counts.sum() == count and len(index.counts) == max(1, len(index.classes)),
        index.names.dtype.kind == index.classes.dtype.kind == "S",
        index.offsets.dtype == index.sizes.dtype == np.int64,
        isinstance(index.ignored, int) and isinstance(index.good, int) and index.fault == "",
    ]
    if not all(tables) or not count:
        return False
    inside = (index.offsets >= BLOCK) & (index.sizes >= 0) & (index.offsets + index.sizes <= size)
    if not inside.all():
        return False
    chosen = np.random.default_rng(0).choice(count, min(count, SPOT_CHECKS), replace=False)
    for row in chosen.tolist():
        header = os.pread(descriptor, BLOCK, int(index.offsets[row]) - BLOCK)
        if len(header) < BLOCK or int(index.sizes[row]) != _number(header[124:136], 0):
            return False  # (a pax size, above 8 GiB, is not found again: indexed anew each time)
        short = _short_name(header)[:80].rpartition(b"/")[2]
        if not bytes(index.names[row]).rpartition(b"/")[2].startswith(short):
            return False
    return True


# ------------------------------------------------------------------------------------ the source


class TarArchive(InArrays):
    """The images of an ILSVRC archive, in the order and with the labels of an ImageFolder tree.

    Args:
        path: the training archive (a tar of one tar a class) or the validation archive (flat).
        wnids: class of every image of a flat archive, by file name without extension
            (`labels.read_labels`).
        damaged: take the whole classes of an archive that is truncated; `fault` then says so.

    Raises:
        UsageError: it is not such an archive, or `wnids` is missing or superfluous.
        RunError: the archive is truncated or damaged, a member is refused, an image has no label.
    """

    kind = "tar"
    arrays = "files", "labels", "offsets", "sizes"

    def __init__(
        self, path: Path, wnids: Mapping[str, str] | None = None, damaged: bool = False
    ) -> None:
        index = index_tar(path)
        self.where, self.path = str(path), str(path)
        self.ignored, self.fault = index.ignored, index.fault
        self.classes: tuple[str, ...] = tuple(os.fsdecode(name) for name in index.classes.tolist())
        self.files, self.offsets, self.sizes = index.names, index.offsets, index.sizes
        self.labels = np.repeat(np.arange(len(index.counts)), index.counts)
        if index.fault and not damaged:
            raise RunError(describe_fault(path, index))
        if self.classes and wnids is not None:
            raise UsageError(f"{path} holds one tar a class, so --labels is not needed")
        if not self.classes and (wnids is not None or not index.fault):
            self._label(wnids, whole=bool(index.fault))
        state = path.stat()
        self.stamp = f"{state.st_size} {state.st_mtime_ns}"

    def _label(self, wnids: Mapping[str, str] | None, whole: bool) -> None:
        """Order a flat archive by class; of one that is truncated, keep the `whole` classes."""
        if not len(self.files):
            raise UsageError(f"{self.where} holds no image")
        if wnids is None and (np.strings.find(self.files, b"/") >= 0).all():
            raise UsageError(
                f"{self.where} is not packed as ImageNet is, it holds images in folders, for instance"
                f" {os.fsdecode(bytes(self.files[0]))}: unpack it and give --data_dir"
            )
        if wnids is None:
            raise UsageError(
                f"{self.where} holds {len(self.files):,} images side by side: name their labels"
                " with --labels (LOC_val_solution.csv, the devkit's .tar.gz or a table)"
            )
        files = [os.fsdecode(name) for name in self.files.tolist()]
        self.classes, labels = labels_of(files, wnids, self.where)
        all_labelled(files, labels, self.where)
        order = np.argsort(labels, kind="stable")
        if whole:
            wanted = Counter(wnids.values())
            counts = np.bincount(labels).tolist()
            kept = [n == wanted[name] for n, name in zip(counts, self.classes, strict=True)]
            order = order[np.array(kept)[labels[order]]]
            self.classes = tuple(np.array(self.classes)[kept].tolist())
            labels = np.cumsum(kept)[labels] - 1
        self.files, self.labels = self.files[order], labels[order]
        self.offsets, self.sizes = self.offsets[order], self.sizes[order]

    def file(self, index: int) -> str:
        """The image's name inside its class."""
        return os.fsdecode(bytes(self.files[index]))

    def name(self, index: int) -> str:
        """`class/file`, as in the tree that the archive would unpack to."""
        return f"{self.classes[int(self.labels[index])]}/{self.file(index)}"

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and its label; OSError when the archive has shrunk."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            size = int(self.sizes[index])
            data = os.pread(descriptor, size, int(self.offsets[index]))
        finally:
            os.close(descriptor)
        if len(data) < size:
            raise OSError(f"{self.path} was truncated while it was read")
        return data, int(self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 over the archive's size and time and over name, label and place of every image."""
        head = f"{self.stamp}\n{chr(10).join(self.classes)}\n"
        return checksum(head.encode(), self.files, self.labels, self.offsets, self.sizes)


def describe_fault(path: Path, index: TarIndex) -> str:
    """One sentence: what is wrong with the archive, how much of it is good, what to do."""
    size = path.stat().st_size
    what = f"{len(index.names):,} images"
    if len(index.classes):
        what = f"{len(index.classes):,} whole classes with {what}"
    return (
        f"{path} is truncated or damaged: {index.fault}; good are {what} in the first"
        f" {index.good:,} of {size:,} bytes; complete the download (`curl -C -` or `wget -c`)"
        f" or make the archive anew, and run this again"
    )

"""The classes of images that lie side by side, from whichever file says them.

Read are tables (`label_table.py`; Kaggle's `LOC_val_solution.csv` is one) and ImageNet's devkit,
`ILSVRC2012_devkit_t12.tar.gz`. Both give class names (wnids such as n01440764): the devkit's numbers
have an order of their own, and taking them for labels is the classic way to an accuracy of 0.1 %.
"""

import gzip
import io
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.errors import RunError, UsageError, reason_of
from ffcv_imnet.core.names import quoted, shown
from ffcv_imnet.core.paths import open_regular
from ffcv_imnet.images.label_table import Rows, read_table

LARGEST = 64 << 20  # bytes that the devkit unpacks to; the real one has a few MB
LARGEST_MAT = 8 << 20  # bytes of all variables of meta.mat, unpacked; the real one has 1 MB
HEADER = 128  # bytes of a .mat file before its first element
MATRIX, COMPRESSED = 14, 15  # types of its elements
NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
CHARACTERS = 4  # the class of a matrix
WNID = re.compile(r"n\d{8}", re.ASCII)
Order = Literal["<", ">"]
ORDERS: dict[Order, Literal["little", "big"]] = {"<": "little", ">": "big"}
VAL_NAME = "ILSVRC2012_val_{:08d}"  # the n-th line of the devkit's ground truth is this image's


def read_labels(path: Path) -> dict[str, str]:
    """Class name of every image, by its file name as the file has it.

    Raises:
        UsageError: there is no such file, or it is none of the three.
    """
    try:
        with open_regular(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
        return _read_devkit(path) if packed else read_table(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None


def labels_of(
    files: Sequence[str], wnids: Mapping[str, str], where: str, root: str = ""
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The sorted classes of `files`, and each file's index into them, -1 for one without a label.

    Args:
        files: paths relative to `root`, which the table may name too.
        wnids: class name by file name, see `read_labels`.
        where: what messages call the images.
        root: the folder they are in.

    Raises:
        RunError: a row of the table fits two of them.
    """
    rows = Rows(wnids).of_all([f"{root}/{file}" for file in files])
    taken: dict[str, str] = {}
    names: list[str | None] = []
    for file, row in zip(files, rows, strict=True):
        names.append(None if row is None else wnids[row])
        if row is not None and (other := taken.setdefault(row, file)) != file:
            raise RunError(
                f"the label of {quoted(row)} fits two images of {where}, {other} and {file}: write"
                " their folders into the label file too"
            )
    unused = sorted(set(wnids) - set(taken))
    if taken and unused:  # a list of all may well go with some images
        print(
            f"{len(unused):,} of {len(wnids):,} labels have no image in {where}, for instance"
            f" {', '.join(map(quoted, unused[:3]))}",
            file=sys.stderr,
        )
    classes = tuple(sorted({name for name in names if name is not None}))
    number = {name: index for index, name in enumerate(classes)}
    return classes, np.array([-1 if n is None else number[n] for n in names], np.int64)


def all_labelled(files: Sequence[str], labels: NDArray[np.int64], where: str) -> None:
    """Raises RunError where `labels_of` found none for some."""
    if said := unlabelled(files, labels, where):
        raise RunError(f"{said}: is it the right label file?")


def unlabelled(files: Sequence[str], labels: NDArray[np.int64], where: str) -> str:
    """How many of `files` have no label, and three of them; nothing if all have one."""
    missing = np.flatnonzero(labels < 0)
    if not len(missing):
        return ""
    some = ", ".join(shown(files[index]) for index in missing[:3])
    return f"{len(missing):,} of the {len(files):,} images of {where} have no label, for instance {some}"


# -------------------------------------------------------------------------------- as the devkit


def _read_devkit(path: Path) -> dict[str, str]:
    wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    held: dict[str, bytes] = {}
    try:
        # Unpacked as a whole first: what it expands to is bounded here and nowhere else.
        with gzip.open(path) as packed:
            data = packed.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UsageError(f"{path} unpacks to more than {LARGEST >> 20} MB: it is no devkit")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                file = archive.extractfile(member) if name in wanted and member.isreg() else None
                if file is not None:
                    held[name] = file.read()
    except (
        tarfile.TarError,
        EOFError,
        zlib.error,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UsageError(f"{path} is no devkit, or is truncated: {reason_of(error)}") from None
    for name in wanted:
        if name not in held:
            raise UsageError(f"{path} has no {name}: it is not ILSVRC2012_devkit_t12.tar.gz")
    try:
        wnids = _synsets(held["meta.mat"])
        truth = [int(line) for line in held[wanted[1]].split()]
        return {VAL_NAME.format(n): wnids[synset] for n, synset in enumerate(truth, 1)}
    except (LookupError, ValueError) as error:
        what = quoted(reason_of(error))
        raise UsageError(f"{path}: its meta.mat and ground truth do not agree ({what})") from None


# MathWorks' "MAT-File Format", level 5: a header, then elements of a type, a size and data. scipy reads
# all of it, descends as deep as a file says and ends the process on some damaged ones; this reads the one
# struct array that is wanted, and nothing that its bytes do not hold.


def _synsets(mat: bytes) -> dict[int, str]:
    """wnid by ILSVRC2012_ID, from the struct array `synsets`. Raises ValueError, KeyError."""
    if len(mat) < HEADER or mat[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise ValueError("meta.mat is no level 5 .mat file")
    order: Order = "<" if mat[126:128] == b"IM" else ">"
    for kind, body in _elements(_unpacked(mat, order), order):
        parts = list(_elements(body, order)) if kind == MATRIX else []
        if len(parts) > 5 and parts[2][1] == b"synsets":
            break
    else:
        raise ValueError("meta.mat has no struct array synsets")
    width, names = int.from_bytes(parts[3][1], ORDERS[order]), parts[4][1]
    if not 0 < width <= len(names):
        raise ValueError("meta.mat is damaged in the names of its fields")
    fields = [names[at : at + width].split(b"\0")[0] for at in range(0, len(names), width)]
    cells = [_value(body, order) for _, body in parts[5:]]
    found: dict[int, str] = {}
    for first in range(0, len(cells) - len(fields) + 1, len(fields)):
        row = dict(zip(fields, cells[first : first + len(fields)], strict=True))
        number, wnid = row.get(b"ILSVRC2012_ID"), row.get(b"WNID")
        if type(number) is not int or not isinstance(wnid, str) or not WNID.fullmatch(wnid):
            raise ValueError(f"meta.mat has a synset {quoted(number)} called {quoted(wnid)}")
        found[number] = wnid
    return found


def _value(body: bytes, order: Order) -> int | str | None:
    """The text of a matrix of characters, the first of one of numbers; None of any other."""
    parts = list(_elements(body, order))
    if len(parts) != 4:  # flags, dimensions, name, data
        return None
    flags, (kind, data) = parts[0][1], parts[3]
    if flags[0 if order == "<" else 3 : 4][:1] == bytes([CHARACTERS]):
        coding = {4: f"utf-16-{ORDERS[order][0]}e", 17: f"utf-16-{ORDERS[order][0]}e", 16: "utf-8"}
        return data.decode(coding.get(kind, "latin-1")).strip()
    if kind not in NUMBERS or len(data) < np.dtype(NUMBERS[kind]).itemsize:
        return None
    first = np.frombuffer(data, order + NUMBERS[kind], count=1)[0]
    return int(first) if np.isfinite(first) else None


def _elements(data: bytes, order: Order) -> Iterator[tuple[int, bytes]]:
    """Type and data of the elements that follow one another. Raises ValueError where one is truncated."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        start, after = at + 8, at + 8 + size + (-size % 8)
        if kind >> 16:  # a small one: its size above its type, its data in the word behind
            kind, size, start, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError("meta.mat is damaged: a small element of more than four bytes")
        if start + size > len(data):
            raise ValueError("meta.mat is truncated")
        yield kind, data[start : start + size]
        at = after


def _unpacked(mat: bytes, order: Order) -> bytes:
    """The elements of a .mat file with the compressed ones in plain. Raises ValueError for a bomb."""
    plain, at = bytearray(), HEADER
    while at + 8 <= len(mat):
        kind, size = struct.unpack_from(order + "II", mat, at)
        data = mat[at + 8 : at + 8 + size]
        stream = zlib.decompressobj() if kind == COMPRESSED else None
        try:
            plain += stream.decompress(data, LARGEST_MAT + 1) if stream else mat[at : at + 8] + data
        except zlib.error as error:
            raise ValueError(f"meta.mat: {error}") from None
        if len(plain) > LARGEST_MAT:
            raise ValueError(f"meta.mat unpacks to more than {LARGEST_MAT >> 20} MB")
        if len(data) < size or (stream and not stream.eof):
            raise ValueError("meta.mat is truncated")
        at += 8 + size
    return bytes(plain)

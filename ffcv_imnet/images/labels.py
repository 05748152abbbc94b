"""The classes of images that lie side by side, from whichever file says them.

Read are tables (`label_table.py`; Kaggle's `LOC_val_solution.csv` is one) and ImageNet's devkit,
`ILSVRC2012_devkit_t12.tar.gz`. Both give class names (wnids such as n01440764): the devkit's numbers
have an order of their own, and taking them for labels is the classic way to an accuracy of 0.1 %.
"""

import gzip
import io
import math
import struct
import sys
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from ffcv_imnet.core.bounded import memory_at_most
from ffcv_imnet.core.errors import RunError, UsageError, reason_of
from ffcv_imnet.core.names import quoted
from ffcv_imnet.core.paths import open_regular
from ffcv_imnet.images.label_table import Rows, read_table

LARGEST = 64 << 20  # bytes that the devkit unpacks to; the real one has a few MB
LARGEST_MAT = 8 << 20  # bytes of all variables of meta.mat, unpacked; the real one has 1 MB
DEEPEST = 8  # matrices in each other there; the real one has two
HEADER = 128  # bytes of a .mat file before its first element
INT32, MATRIX, COMPRESSED = 5, 14, 15  # types of its elements
Order = Literal["<", ">"]
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
    report_unused(set(wnids) - set(taken), wnids, where)
    classes = tuple(sorted({name for name in names if name is not None}))
    number = {name: index for index, name in enumerate(classes)}
    return classes, np.array([-1 if n is None else number[n] for n in names], np.int64)


def report_unused(unused: set[str], wnids: Mapping[str, str], where: str) -> None:
    """Say how many labels have no image: a list of all may well go with some of the images."""
    if unused:
        some = ", ".join(map(quoted, sorted(unused)[:3]))
        print(
            f"{len(unused):,} of {len(wnids):,} labels have no image in {where}, for instance {some}",
            file=sys.stderr,
        )


def all_labelled(files: Sequence[str], labels: NDArray[np.int64], where: str) -> None:
    """Raises RunError where `labels_of` found none for some."""
    missing = np.flatnonzero(labels < 0)
    if len(missing):
        raise RunError(
            f"{len(missing):,} of the {len(files):,} images of {where} have no label, for instance"
            f" {', '.join(files[index] for index in missing[:3])}: is it the right label file?"
        )


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


def _synsets(mat: bytes) -> dict[int, str]:
    """wnid by ILSVRC2012_ID, from the struct array `synsets`. Raises ValueError, KeyError."""
    if len(mat) < HEADER or mat[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise ValueError("meta.mat is no level 5 .mat file")
    order: Order = "<" if mat[126:128] == b"IM" else ">"
    plain = _unpacked(mat, order)
    _check_nesting(plain, order)
    try:
        with memory_at_most(LARGEST):
            held = loadmat(
                io.BytesIO(mat[:HEADER] + plain), variable_names=["synsets"], simplify_cells=True
            )
        rows = np.atleast_1d(held["synsets"])
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]).strip() for row in rows}
    except Exception as error:  # scipy has a dozen kinds for a damaged file
        raise ValueError(f"meta.mat: {reason_of(error)}") from None


# MathWorks' "MAT-File Format", level 5: a header, then elements of a type, a size and data.


def _unpacked(mat: bytes, order: Order) -> bytes:
    """The elements of a .mat file with the compressed ones in plain. Raises ValueError for a bomb."""
    plain, at = bytearray(), HEADER
    while at + 8 <= len(mat):
        kind, size = struct.unpack_from(order + "II", mat, at)
        data = mat[at + 8 : at + 8 + size]
        if kind == COMPRESSED:
            stream = zlib.decompressobj()
            try:
                plain += stream.decompress(data, LARGEST_MAT + 1)
            except zlib.error as error:
                raise ValueError(f"meta.mat: {error}") from None
        else:
            stream = None
            plain += mat[at : at + 8] + data
        if len(plain) > LARGEST_MAT:
            raise ValueError(f"meta.mat unpacks to more than {LARGEST_MAT >> 20} MB")
        if len(data) < size or (stream and not stream.eof):
            raise ValueError("meta.mat is truncated")
        at += 8 + size
    return bytes(plain)


def _check_nesting(plain: bytes, order: Order) -> None:
    """Raises ValueError where matrices lie in matrices more than `DEEPEST` deep, or claim more elements
    than there are bytes: scipy descends in C, without a bound, and makes room for what is claimed.
    """
    parts = [(0, len(plain), 0)]
    while parts:
        at, end, depth = parts.pop()
        if depth > DEEPEST:
            raise ValueError(f"meta.mat nests more than {DEEPEST} deep")
        place = 0
        while at + 8 <= end:
            kind, size = struct.unpack_from(order + "II", plain, at)
            if kind >> 16:  # a small element: its size above its type, its data in the word behind
                kind, size, data, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            else:
                data, after = at + 8, at + 8 + size + (-size % 8)
            if kind == MATRIX:
                parts.append((data, min(data + size, end), depth + 1))
            elif kind == INT32 and place == 1:  # a matrix' dimensions stand after its flags
                sides = np.frombuffer(plain[data : data + size // 4 * 4], f"{order}i4").tolist()
                if math.prod(sides) > len(plain) or min(sides, default=0) < 0:
                    raise ValueError("meta.mat claims more elements than it has bytes")
            at, place = after, place + 1

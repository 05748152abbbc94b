"""The classes of images that lie side by side, from whichever file says them.

Read are tables (`label_table.py`; Kaggle's `LOC_val_solution.csv` is one) and ImageNet's devkit,
`ILSVRC2012_devkit_t12.tar.gz`. Both give class names (wnids such as n01440764): the devkit's numbers
have an order of their own, and taking them for labels is the classic way to an accuracy of 0.1 %.
"""

import io
import struct
import sys
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.names import quoted
from ffcv_imnet.images.label_table import Rows, read_table

LARGEST = 1 << 26  # bytes of one of the devkit's files; the real ones have 0.3 MB
VAL_NAME = "ILSVRC2012_val_{:08d}"  # the n-th line of the devkit's ground truth is this image's


def read_labels(path: Path) -> dict[str, str]:
    """Class name of every image, by its file name as the file has it.

    Raises:
        UsageError: there is no such file, or it is none of the three.
    """
    try:
        with path.open("rb") as file:
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
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in wanted and member.isreg() and member.size <= LARGEST:
                    file = archive.extractfile(member)
                    held[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is no devkit, or is cut off: {error}") from None
    for name in wanted:
        if name not in held:
            raise UsageError(f"{path} has no {name}: it is not ILSVRC2012_devkit_t12.tar.gz")
    try:
        wnids = _synsets(held["meta.mat"])
        truth = [int(line) for line in held[wanted[1]].split()]
        return {VAL_NAME.format(n): wnids[synset] for n, synset in enumerate(truth, 1)}
    except (ValueError, KeyError, IndexError, struct.error, zlib.error, RecursionError) as error:
        raise UsageError(f"{path}: its meta.mat and ground truth do not agree ({error})") from None


def _synsets(mat: bytes) -> dict[int, str]:
    """wnid by ILSVRC2012_ID, from the struct array `synsets`."""
    for variable in read_mat(mat):
        if variable.name == "synsets":
            numbers, wnids = variable.fields["ILSVRC2012_ID"], variable.fields["WNID"]
            return {
                int(n.values[0]): bytes(w.values.astype(np.uint8)).decode("ascii").strip()
                for n, w in zip(numbers, wnids, strict=True)
            }
    raise ValueError("meta.mat has no synsets")


@dataclass(frozen=True)
class Matrix:
    """A variable of a MATLAB file: numbers or characters, or a struct array by field."""

    name: str
    values: NDArray[np.generic]
    fields: dict[str, list["Matrix"]]


# MATLAB's "MAT-File Format", level 5: types of data elements and classes of arrays.
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
         16: "u1", 17: "u2", 18: "u4"}  # fmt: skip
MATRIX, COMPRESSED = 14, 15
CELL, STRUCT, OBJECT, SPARSE = 1, 2, 3, 5


def read_mat(data: bytes) -> list[Matrix]:
    """The variables of a level 5 .mat file: numeric, character and struct arrays.

    Raises:
        ValueError, struct.error, IndexError, zlib.error: it is damaged or holds something else.
    """
    if len(data) < 128 or data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise ValueError("not a level 5 .mat file")
    order = "<" if data[126:128] == b"IM" else ">"
    file, found = io.BytesIO(data[128:]), []
    while file.tell() < len(data) - 128:
        kind, body = _element(file, order)
        if kind == COMPRESSED:
            kind, body = _element(io.BytesIO(_inflate(body)), order)
        if kind == MATRIX:
            found.append(_matrix(body, order))
    return found


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    plain = stream.decompress(data, LARGEST)
    if stream.unconsumed_tail:
        raise ValueError("too large")
    return plain


def _element(file: io.BytesIO, order: str) -> tuple[int, bytes]:
    """The type and the bytes of the next data element; small ones hold both in eight bytes."""
    tag = file.read(8)
    kind, size = struct.unpack(order + "II", tag)
    if kind >> 16:
        return kind & 0xFFFF, tag[4 : 4 + (kind >> 16)]
    body = file.read(size)
    if len(body) < size:
        raise ValueError("cut off")
    if kind != COMPRESSED:
        file.seek(-size % 8, io.SEEK_CUR)
    return kind, body


def _values(file: io.BytesIO, order: str) -> NDArray[np.generic]:
    kind, body = _element(file, order)
    return np.frombuffer(body, np.dtype(order + TYPES[kind]))


def _matrix(body: bytes, order: str) -> Matrix:
    if not body:  # an empty field of a struct
        return Matrix("", np.empty(0), {})
    file = io.BytesIO(body)
    flags, shape = _values(file, order), _values(file, order)
    name = _values(file, order).tobytes().decode("ascii")
    kind = int(flags[0]) & 0xFF
    if kind in (CELL, OBJECT, SPARSE):
        raise ValueError(f"arrays of class {kind} are not read")
    if kind != STRUCT:
        return Matrix(name, _values(file, order), {})
    width = int(_values(file, order)[0])
    keys = np.frombuffer(_values(file, order).tobytes(), f"S{width}")
    fields: dict[str, list[Matrix]] = {key.decode("ascii"): [] for key in keys.tolist()}
    for _ in range(int(np.prod(shape.astype(np.int64)))):
        for values in fields.values():
            values.append(_matrix(_element(file, order)[1], order))
    return Matrix(name, np.empty(0), fields)

"""A .beton that another program wrote: every stored image read and decoded once, in parallel."""

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.beton import Tables, verify_tables
from ffcv_imnet.images.parallel import in_order
from ffcv_imnet.images.pixels import BadImage, decode_rgb
from ffcv_imnet.images.stored import RAW, sample_digest

ROW = np.dtype(
    [
        ("pointer", "u8"),
        ("size", "u8"),
        ("label", "i8"),
        ("mode", "u1"),
        ("height", "u2"),
        ("width", "u2"),
    ]
)


@dataclass(frozen=True)
class Samples:
    """Samples of a .beton, (samples,) of `ROW`: little to send to a worker."""

    path: Path
    rows: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: NDArray[np.int64]) -> Self:
        """These alone, in this order."""
        return type(self)(self.path, self.rows[indices])


@dataclass(frozen=True)
class Look:
    """What reading one sample gave."""

    digest: bytes  # see `sample_digest`
    fault: str  # empty if it decodes to the size that the table says


@dataclass(frozen=True)
class Content:
    """What reading all of them gave."""

    checksum: str  # as `beton.content_checksum`
    faults: dict[int, str]  # by sample


def samples_of(path: Path, tables: Tables) -> Samples:
    """All samples of `path`."""
    rows = np.zeros(len(tables.labels), ROW)
    columns = "pointers", "sizes", "labels", "modes", "heights", "widths"
    for name, column in zip(ROW.names or (), columns, strict=True):
        rows[name] = getattr(tables, column)
    return Samples(path, rows)


def look_at(part: Samples, _: NDArray[np.int64]) -> list[Look]:
    """Read and decode all of `part`."""
    found = []
    with part.path.open("rb") as file:
        for pointer, size, label, mode, height, width in part.rows.tolist():
            file.seek(pointer)
            data = file.read(size)
            found.append(Look(sample_digest(label, data), _fault(data, mode, height, width)))
    return found


def _fault(data: bytes, mode: int, height: int, width: int) -> str:
    if mode == RAW:
        return ""  # its size is height x width x 3, or its entry in the table was refused
    try:
        found = decode_rgb(data).shape[:2]
    except BadImage as bad:
        return f"does not decode ({bad})"
    if found != (height, width):
        return f"is {found[1]} x {found[0]} pixels, said to be {width} x {height}"
    return ""


def read_content(path: Path, tables: Tables, classes: int, num_workers: int) -> Content:
    """Every entry of the tables checked, then every sample read and decoded by `num_workers` processes.

    Raises:
        RunError: an entry cannot be, or a worker died.
    """
    verify_tables(path, tables, classes)
    samples, digest, faults, number = samples_of(path, tables), hashlib.sha256(), {}, 0
    with (
        closing(in_order(samples, look_at, num_workers)) as chunks,
        Progress(len(samples), f"decoding {path.name}") as progress,
    ):
        for chunk in chunks:
            for look in chunk:
                digest.update(look.digest)
                if look.fault:
                    faults[number] = look.fault
                number += 1
            progress.update(len(chunk), f"{len(faults):,} damaged" if faults else "")
    return Content(f"sha256:{digest.hexdigest()}", faults)

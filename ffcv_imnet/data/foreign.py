"""A .beton that another program wrote: every stored image read and decoded once, in parallel."""

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.beton import Tables, fault_of_pixels, verify_tables
from ffcv_imnet.images.parallel import in_order
from ffcv_imnet.images.stored import sample_digest


@dataclass(frozen=True)
class Samples:
    """Samples of a .beton: little to send to a worker."""

    path: Path
    rows: NDArray[Any]  # (samples,) of pointer, size, label, mode, height, width

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: NDArray[np.int64]) -> Self:
        """These alone, in this order."""
        return type(self)(self.path, self.rows[indices])


@dataclass(frozen=True)
class Content:
    """What reading all of them gave."""

    checksum: str  # as `beton.content_checksum`
    faults: dict[int, str]  # by sample


def look_at(part: Samples, _: NDArray[np.int64]) -> list[tuple[bytes, str]]:
    """Read and decode all of `part`: each one's `sample_digest` and what is wrong with it."""
    found = []
    with part.path.open("rb") as file:
        for pointer, size, label, *shape in part.rows.tolist():
            file.seek(pointer)
            data = file.read(size)
            found.append((sample_digest(label, data), fault_of_pixels(data, *shape)))
    return found


def read_content(path: Path, tables: Tables, classes: int, num_workers: int) -> Content:
    """Every entry of the tables checked, then every sample read and decoded by `num_workers` processes.

    Raises:
        RunError: an entry cannot be, or a worker died.
    """
    verify_tables(path, tables, classes)
    columns = tables.pointers, tables.sizes, tables.labels, *tables.shapes
    samples = Samples(path, np.rec.fromarrays(columns))
    digest, faults, number = hashlib.sha256(), {}, 0
    with (
        closing(in_order(samples, look_at, num_workers)) as chunks,
        Progress(len(samples), f"decoding {path.name}") as progress,
    ):
        for chunk in chunks:
            for of_sample, fault in chunk:
                digest.update(of_sample)
                if fault:
                    faults[number] = fault
                number += 1
            progress.update(len(chunk), f"{len(faults):,} damaged" if faults else "")
    return Content(f"sha256:{digest.hexdigest()}", faults)

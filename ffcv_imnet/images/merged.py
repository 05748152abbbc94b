"""Several folders as one: images of a class come together, whichever folder they lie in."""

import hashlib
import os
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.images import ImageSource, Pixels


class Merged:
    """The images of several sources, by class, within a class in the order of the sources."""

    kind = "several folders"

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self.parts = tuple(parts)
        self.classes: tuple[str, ...] = tuple(sorted({n for part in parts for n in part.classes}))
        number = {name: index for index, name in enumerate(self.classes)}
        labels = [np.array([number[n] for n in part.classes])[part.labels] for part in parts]
        places = [
            np.stack([np.full(len(part), n), np.arange(len(part))], 1)
            for n, part in enumerate(parts)
        ]
        order = np.argsort(np.concatenate(labels), kind="stable")
        self.labels: NDArray[np.int64] = np.concatenate(labels)[order]
        self.places: NDArray[np.int64] = np.concatenate(places)[order]  # (images, 2): part, index
        self.roots = [os.path.abspath(part.where) for part in parts]  # noqa: PTH100
        self.where = os.path.commonpath(self.roots)

    @property
    def ignored(self) -> int:
        """Files that are no images, of all parts."""
        return sum(part.ignored for part in self.parts)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path, relative to the folder that holds them all."""
        part, place = self.places[index].tolist()
        return os.path.relpath(f"{self.roots[part]}/{self.parts[part].name(place)}", self.where)

    def read(self, index: int) -> tuple[bytes | Pixels, int]:
        """The file's bytes and its label here; OSError when it cannot be read."""
        part, place = self.places[index].tolist()
        return self.parts[part].read(place)[0], int(self.labels[index])

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """These images alone, in this order; of each part only what is used, to be sent to a worker."""
        part = type(self).__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.labels, places = self.labels[indices], self.places[indices].copy()
        used = []
        for number, source in enumerate(self.parts):
            rows = np.flatnonzero(places[:, 0] == number)
            used.append(source.subset(places[rows, 1]))
            places[rows, 1] = np.arange(len(rows))
        part.places, part.parts = places, tuple(used)
        return part

    def fingerprint(self) -> str:
        """Over those of the parts."""
        together = "\n".join(part.fingerprint() for part in self.parts)
        return f"sha256:{hashlib.sha256(together.encode()).hexdigest()}"

"""Several folders as one: images of a class come together, whichever folder they lie in."""

import os
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.images import ImageSource, InArrays, Pixels
from ffcv_imnet.images.stored import checksum


class Merged(InArrays):
    """The images of several sources, by class, within a class in the order of the sources."""

    kind = "several folders"
    arrays = "labels", "places"

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self.parts, self.ignored = tuple(parts), sum(part.ignored for part in parts)
        self.classes: tuple[str, ...] = tuple(sorted({n for part in parts for n in part.classes}))
        number = {name: index for index, name in enumerate(self.classes)}
        labels = [np.array([number[n] for n in part.classes])[part.labels] for part in parts]
        places = [
            np.stack([np.full(len(part), n), np.arange(len(part))], 1)
            for n, part in enumerate(parts)
        ]
        order = np.argsort(np.concatenate(labels), kind="stable")
        self.labels = np.concatenate(labels)[order]
        self.places: NDArray[np.int64] = np.concatenate(places)[order]  # (images, 2): part, index
        self.roots = [os.path.abspath(part.where) for part in parts]  # noqa: PTH100
        self.where = os.path.commonpath(self.roots)

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
        part = super().subset(indices)
        part.places, used = part.places.copy(), []
        for number, source in enumerate(self.parts):
            rows = np.flatnonzero(part.places[:, 0] == number)
            used.append(source.subset(part.places[rows, 1]))
            part.places[rows, 1] = np.arange(len(rows))
        part.parts = tuple(used)
        return part

    def fingerprint(self) -> str:
        """Over those of the parts."""
        return checksum("\n".join(part.fingerprint() for part in self.parts).encode())

"""Where the images come from, and what is stored of each.

`ImageSource` is all the writer knows of a source. `sources.py` picks one: `folder.py` has the
ImageFolder tree, `kaggle.py` Kaggle's layout, `tar.py` ImageNet's archives, `parquet.py` the hub's
shards; `labels.py` reads who belongs where in a flat validation set. `pixels.py` turns encoded bytes
into RGB pixels, `encode.py` into what a .beton stores, `parallel.py` does it in worker processes,
`forecast.py` foretells the cost. Nothing in here imports torch or ffcv: a worker must start in a fraction
of a second.
"""

from collections.abc import Sequence
from copy import copy
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
# Bytes of an encoded one: --max_pixels of four times 16 bits have three quarters.
LARGEST_FILE = 2 << 30
POINTER = b"version https://git-lfs"  # what `git clone` leaves in place of a large file


class ImageSource(Protocol):
    """An indexable set of labelled images, in the order in which they will be stored.

    The writer never sends a whole source to a worker, only `subset`s of a few images, so a source
    may be large but each part of it must pickle to little: paths or offsets, not open files.
    """

    @property
    def where(self) -> str:
        """What messages call the source: a folder, an archive."""

    @property
    def kind(self) -> str:
        """What the manifest calls this sort of source."""

    @property
    def ignored(self) -> int:
        """Files that are no images by their extension."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; a label is an index into them."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(len,) class index of every image."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes | Pixels, int]:
        """The encoded file (or RGB pixels) of image `index`, and its label.

        Raises:
            OSError: it cannot be read; the message is the reason that the user will see.
        """

    def name(self, index: int) -> str:
        """What messages and the manifest call image `index`; unique, with forward slashes."""

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """A source of these images alone, in this order, with the same classes."""

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, renamed or modified; reads no image."""


class InArrays:
    """What the sources share that have a row an image in some arrays, here by their names."""

    arrays: ClassVar[tuple[str, ...]] = ("files", "labels")
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """The same source with these images alone, in this order."""
        part = copy(self)
        for name in self.arrays:
            setattr(part, name, getattr(self, name)[indices])
        return part

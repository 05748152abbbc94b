"""An ImageFolder tree: one folder a class, the photographs inside, as torchvision reads it."""

import hashlib
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.errors import UsageError, nearest

# torchvision.datasets.folder.IMG_EXTENSIONS; compared in lower case.
EXTENSIONS = (b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".pgm", b".tif", b".tiff", b".webp")


class ImageFolderTree:
    """The images of `root`/<class>/**, in torchvision.datasets.ImageFolder's order and labels.

    Classes are the sub-folders sorted by name. A million paths are held as one array of bytes,
    about 30 MB, because a million `str` objects would take three times as much.

    Args:
        root: holds the folders.
        may_be_empty: some of them, said once: a class that is only trained.

    Raises:
        UsageError: `root` is missing, has no class folders, or one of them holds no image.
    """

    kind = "folder"

    def __init__(self, root: Path, may_be_empty: bool = False) -> None:
        _check_root(root)
        self.where = str(root)
        self.classes: tuple[str, ...] = tuple(
            sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        )
        if not self.classes:
            raise UsageError(_no_classes(root))
        self.ignored = 0  # files inside class folders that are not images by their extension
        listings = [self._list_class(name) for name in self.classes]
        counts = [len(listing) for listing in listings]
        _check_empty(root, self.classes, counts, may_be_empty)
        self.files: NDArray[np.bytes_] = np.concatenate(listings)  # relative to the root
        self.labels: NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)

    def _list_class(self, name: str) -> NDArray[np.bytes_]:
        root = os.fsencode(self.where) + b"/"
        found: list[bytes] = []
        # Sorted like torchvision: by folder, then by file. Links are followed, as there.
        for folder, _, files in sorted(os.walk(root + os.fsencode(name), followlinks=True)):
            images = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
            self.ignored += len(files) - len(images)
            found += [folder[len(root) :] + b"/" + file for file in images]
        return np.array(found, dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """`class/file`, relative to the root."""
        return os.fsdecode(bytes(self.files[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and its label; OSError when it cannot be read."""
        # O_NONBLOCK: opening a pipe that someone named x.jpg would otherwise wait for ever.
        descriptor = os.open(f"{self.where}/{self.name(index)}", os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("not a regular file")
            return file.read(), int(self.labels[index])

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """The same tree with these images alone, in this order."""
        part = type(self).__new__(type(self))
        part.where, part.classes, part.ignored = self.where, self.classes, self.ignored
        part.files, part.labels = self.files[indices], self.labels[indices]
        return part

    def fingerprint(self) -> str:
        """SHA-256 over path, size and modification time of every image.

        The time is in it because raw formats keep their size when their pixels change: a stale
        .beton taken for current would be worse than one written again after a copy of the tree.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            name = self.name(index)
            try:
                entry = os.stat(f"{self.where}/{name}")  # noqa: PTH116 - a million times
                known = f"{name}\0{entry.st_size}\0{entry.st_mtime_ns}\n"
            except OSError:
                known = f"{name}\0unreadable\n"
            digest.update(os.fsencode(known))
        # The others stand in the paths.
        for label in np.setdiff1d(np.arange(len(self.classes)), self.labels).tolist():
            digest.update(os.fsencode(f"{self.classes[label]}\0no image\n"))
        return f"sha256:{digest.hexdigest()}"


def _check_root(root: Path) -> None:
    if root.is_dir():
        return
    layout = f"expected {root}/<class name>/*.jpg"
    if root.parent.is_file():
        raise UsageError(
            f"{root.parent} is a file, not a folder (a zip must be unpacked): {layout}"
        )
    if not root.parent.is_dir():
        raise UsageError(f"the folder {root.parent} does not exist: {layout}")
    names = sorted(entry.name for entry in os.scandir(root.parent))
    holds = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    # Lower case first: "Train" for "train" is the commonest slip.
    close = [name for name in names if name.lower() == root.name.lower()]
    hint = f" (did you mean {close[0]}?)" if close else nearest(root.name, names)
    if root.parent.absolute().name == root.name:
        hint = f" (did you mean {root.parent.absolute().parent}?)"
    elif any(name.endswith(".tar") for name in names):
        hint = " (a tar is read with --tar)"
    raise UsageError(f"{root.parent} has no folder {root.name!r}: {layout}; it holds {holds}{hint}")


def _no_classes(root: Path) -> str:
    flat = sum(entry.name.lower().encode().endswith(EXTENSIONS) for entry in os.scandir(root))
    have = f"but {flat:,} images side by side" if flat else "and no images"
    return f"{root} holds no class folders {have}: expected {root}/<class name>/*.jpg"


def _check_empty(
    root: Path, classes: Sequence[str], counts: Sequence[int], may_be_empty: bool
) -> None:
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not empty:
        return
    if len(empty) == len(classes):
        raise UsageError(f"no images in any of the {len(classes):,} class folders of {root}")
    names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
    if may_be_empty:
        print(
            f"{len(empty):,} of the {len(classes):,} classes of {root} have no image: {names}; they are"
            " absent from the evaluation",
            file=sys.stderr,
        )
        return
    raise UsageError(
        f"{len(empty):,} of the {len(classes):,} class folders of {root} hold no image: {names};"
        " fill or remove them, since every folder counts as a class"
    )

"""Images whose classes a table says, wherever they lie in a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.names import shown
from ffcv_imnet.images.folder import EXTENSIONS, ImageFolderTree, scan_folder
from ffcv_imnet.images.labels import all_labelled, labels_of, unlabelled
from ffcv_imnet.images.leftovers import Left
from ffcv_imnet.images.stored import checksum

Without = Literal["refused", "noted", "oddity"]


class FlatFolder(ImageFolderTree):
    """The images in `root` and below it, in the order of the tree that their labels would make.

    Args:
        wnids: class name by file name (`labels.read_labels`).
        without: images without a label are `refused`; or left out as those of another split, which is
            `noted`; or left out as an `oddity`.

    Raises:
        UsageError: `root` is missing or holds no image that is wanted.
        RunError: an image has no label, or a label fits two.
    """

    kind = "flat folder"

    def __init__(self, root: Path, wnids: Mapping[str, str], without: Without = "refused") -> None:
        if not root.is_dir():
            raise UsageError(f"the folder {root} does not exist")
        self.where = str(root)
        files, left, self.oddities = walk(root)
        self.ignored, self.notes = left.ignored, [*left.notes()]
        self.oddities += left.oddities()
        if not files:
            raise UsageError(f"{root} holds no images")
        names = [os.fsdecode(file) for file in files]
        self.classes, labels = labels_of(names, wnids, self.where, os.path.abspath(root))  # noqa: PTH100
        if not self.classes:
            raise UsageError(
                f"no label has an image in {root}: labels are of {next(iter(wnids), 'nothing')!r} and"
                f" the like, images are {names[0]!r} and the like"
            )
        if without == "refused":
            all_labelled(names, labels, self.where)
        elif said := unlabelled(names, labels, self.where):
            (self.notes if without == "noted" else self.oddities).append(f"{said}: left out")
        order = np.argsort(labels, kind="stable")[int((labels < 0).sum()) :]
        self.files, self.labels = np.array(files, np.bytes_)[order], labels[order]

    def fingerprint(self) -> str:
        """As the tree's, and over the labels, which are not in the paths here."""
        head = f"{super().fingerprint()}\n{' '.join(self.classes)}\n"
        return checksum(head.encode(), self.labels)


def walk(root: Path) -> tuple[list[bytes], Left, list[str]]:
    """Images below `root`, relative to it and sorted, what else there is, and links that are not
    followed because an image found by two ways would fit its label twice."""
    images: list[bytes] = []
    links: list[bytes] = []
    left, top = Left(), os.fsencode(root)
    waiting = [b""]
    while waiting:
        inside = waiting.pop()
        scan = scan_folder(top + b"/" + inside if inside else top)
        within = inside + b"/" if inside else b""
        found = [file for file in scan.files if file.lower().endswith(EXTENSIONS)]
        images += [within + file for file in found]
        left.leftovers += scan.leftovers
        left.add(top + b"/" + within, sorted(set(scan.files).difference(found)))
        waiting += [within + folder for folder in scan.folders if folder not in scan.links]
        links += [within + link for link in (*scan.links, *scan.broken)]
    odd = f"{len(links):,} folders are links, which are not followed here, for instance "
    return sorted(images), left, [odd + shown(os.fsdecode(min(links)))] if links else []

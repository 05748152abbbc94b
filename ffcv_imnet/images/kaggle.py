"""Kaggle's layout of ImageNet (imagenet-object-localization-challenge), unpacked.

    ROOT/LOC_val_solution.csv
    ROOT/ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG
    ROOT/ILSVRC/Data/CLS-LOC/val/*.JPEG              side by side, labelled by the .csv

Training images are an ImageFolder tree as they stand; `FlatFolder` is the other half.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.images.folder import EXTENSIONS, ImageFolderTree
from ffcv_imnet.images.labels import labels_of

INSIDE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"


def images_of(root: Path) -> Path | None:
    """The folder with train/ and val/ if `root` is, or holds, Kaggle's layout; None otherwise."""
    for folder in (root / INSIDE, root / Path(*INSIDE.parts[1:]), root):
        if folder.absolute().name == INSIDE.name and folder.is_dir():
            return folder
    return None


def solution_of(images: Path) -> Path | None:
    """Kaggle's label file, in one of the folders around the images."""
    for folder in (images, *list(images.absolute().parents)[:3]):
        if (folder / SOLUTION).is_file():
            return folder / SOLUTION
    return None


class FlatFolder(ImageFolderTree):
    """Images side by side in `root`, in the order of the tree that their labels would make.

    Args:
        root: the folder.
        wnids: class name by file name without extension (`labels.read_labels`).

    Raises:
        UsageError: `root` is missing or holds no image.
        RunError: an image has no label.
    """

    kind = "flat folder"

    def __init__(self, root: Path, wnids: Mapping[str, str]) -> None:
        if not root.is_dir():
            raise UsageError(f"the folder {root} does not exist")
        self.where = str(root)
        files = sorted(os.listdir(os.fsencode(root)))  # noqa: PTH208 - bytes
        images = [file for file in files if file.lower().endswith(EXTENSIONS)]
        if not images:
            raise UsageError(f"{root} holds no images")
        self.ignored = len(files) - len(images)
        self.classes, labels = labels_of([os.fsdecode(file) for file in images], wnids, self.where)
        order = np.argsort(labels, kind="stable")
        self.files, self.labels = np.array(images, np.bytes_)[order], labels[order]

    def fingerprint(self) -> str:
        """As the tree's, and over the labels, which are not in the paths here."""
        digest = hashlib.sha256(f"{super().fingerprint()}\n{' '.join(self.classes)}\n".encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        return f"sha256:{digest.hexdigest()}"

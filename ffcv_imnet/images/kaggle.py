"""Kaggle's layout of ImageNet (imagenet-object-localization-challenge), unpacked.

    ROOT/LOC_val_solution.csv
    ROOT/ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG
    ROOT/ILSVRC/Data/CLS-LOC/val/*.JPEG              side by side, labelled by the .csv

Training images are an ImageFolder tree as they stand; `flat.FlatFolder` reads the other half.
"""

from contextlib import suppress
from pathlib import Path

INSIDE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"


def images_of(root: Path) -> Path | None:
    """The folder with train/ and val/ if `root` is, or holds, Kaggle's layout; None otherwise."""
    for folder in (root / INSIDE, root / Path(*INSIDE.parts[1:]), root):
        with suppress(PermissionError):  # of `root`, which whoever opens it will name
            if folder.absolute().name == INSIDE.name and folder.is_dir():
                return folder
    return None


def solution_of(images: Path) -> Path | None:
    """Kaggle's label file, in one of the folders around the images."""
    for folder in (images, *list(images.absolute().parents)[:3]):
        if (folder / SOLUTION).is_file():
            return folder / SOLUTION
    return None

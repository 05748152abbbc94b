"""Which source the images come from, and which of them are taken."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.flat import FlatFolder
from ffcv_imnet.images.folder import FOLDERS, ImageFolderTree
from ffcv_imnet.images.kaggle import SOLUTION, images_of, solution_of
from ffcv_imnet.images.labels import read_labels
from ffcv_imnet.images.merged import Merged
from ffcv_imnet.images.parquet import ParquetShards, shards_of
from ffcv_imnet.images.tar import TarArchive

OFFICIAL = "ILSVRC2012_img_{}.tar"


def open_source(
    split: str,
    data_dirs: Sequence[Path],
    tar: Path | None = None,
    parquet: Path | None = None,
    labels: Path | None = None,
) -> ImageSource:
    """The images of `split`: of `tar` or `parquet` if one is given, else of all `data_dirs` together,
    each of which holds an ImageFolder tree, images that `labels` names, or Kaggle's layout.

    Raises:
        UsageError, RunError: it is not as it should be.
    """
    if tar is not None and parquet is not None:
        raise UsageError("--tar and --parquet exclude each other: give one of them")
    if tar is not None:
        check_split(tar, split)
        return TarArchive(tar, read_labels(labels) if labels else None)
    if parquet is not None:
        if labels is not None:
            raise UsageError("--labels is not needed with --parquet: the shards hold labels")
        return ParquetShards(shards_of(parquet, split))
    parts = [_open_folder(split, folder, labels) for folder in data_dirs]
    return parts[0] if len(parts) == 1 else Merged(parts)


def open_undivided(data_dirs: Sequence[Path], labels: Path | None = None) -> ImageSource:
    """The images to hold some out of: a train folder's, or where there is none those of the class
    folders, or of the labels, right in `data_dirs`.

    Raises:
        UsageError, RunError: as `open_source`.
    """
    if any(images_of(folder) or split_folder(folder, "train").is_dir() for folder in data_dirs):
        for top in (images_of(folder) or folder for folder in data_dirs):
            for val in (top / name for name in FOLDERS["val"]):
                if val.is_dir() and any(val.iterdir()):
                    print(
                        f"{val} is not read: with --holdout both files are of the training images",
                        file=sys.stderr,
                    )
        parts = [_open_folder("train", folder, labels, undivided=True) for folder in data_dirs]
    elif labels:
        parts = [FlatFolder(folder, read_labels(labels), "oddity") for folder in data_dirs]
    else:
        parts = [ImageFolderTree(folder) for folder in data_dirs]
    return parts[0] if len(parts) == 1 else Merged(parts)


def _open_folder(
    split: str, data_dir: Path, labels: Path | None, undivided: bool = False
) -> ImageSource:
    """Where the set is `undivided`, an image without a label is of no other split."""
    images = images_of(data_dir)
    folder = split_folder(images or data_dir, split)
    if folder.is_dir() and folder.name != split:
        print(f"{folder} is taken for {split}", file=sys.stderr)
    if labels is not None:
        if folder.is_dir():
            return FlatFolder(folder, read_labels(labels), "oddity" if undivided else "refused")
        return FlatFolder(data_dir, read_labels(labels), "oddity" if undivided else "noted")
    if split == "val" and images and is_flat(folder):
        solution = solution_of(images)
        if solution is None:
            raise UsageError(
                f"{folder} holds images side by side and no {SOLUTION} lies near: name their"
                " labels with --labels"
            )
        return FlatFolder(folder, read_labels(solution))
    return ImageFolderTree(folder, may_be_empty=split == "val")


def split_folder(data_dir: Path, split: str) -> Path:
    """The folder of `split` in `data_dir`, by the first of its names that is there."""
    for name in FOLDERS.get(split, ()):
        if (data_dir / name).is_dir():
            return data_dir / name
    return data_dir / split


def check_split(tar: Path, split: str) -> None:
    """Raises UsageError where the archive's name is the official one of the other split."""
    other = "val" if split == "train" else "train"
    if tar.name == OFFICIAL.format(other):
        raise UsageError(f"{tar} is the archive of {other}, not of {split}")


def reading_order(source: ImageSource) -> NDArray[np.int64]:
    """The order in which images are best read: theirs, or where a shard must be decompressed for
    them, that of the shards."""
    if isinstance(source, ParquetShards):
        return source.reading_order()
    return np.arange(len(source))


def is_flat(folder: Path) -> bool:
    """Whether it is a folder without folders."""
    return folder.is_dir() and not any(entry.is_dir() for entry in folder.iterdir())


def even_subset(
    labels: NDArray[np.int64], classes: int, count: int, seed: int
) -> NDArray[np.int64]:
    """Indices of `count` images, sorted; classes' counts differ by at most one.

    Raises:
        UsageError: there are not that many images, or not in every class, or fewer than classes.
    """
    if count > len(labels):
        raise UsageError(f"--subset {count:,} is more than the {len(labels):,} images there are")
    have = np.bincount(labels, minlength=classes)
    if count < (have > 0).sum():
        raise UsageError(f"--subset {count:,} leaves some of the {classes:,} classes empty")
    rng = np.random.default_rng(seed)
    each, more = divmod(count, int((have > 0).sum()))
    # One image more for `more` classes, chosen by lot among those that have it.
    lot = rng.permutation(classes)
    quota = np.where(have > 0, each, 0)
    quota[lot[np.argsort(have[lot] <= each, kind="stable")][:more]] += 1
    if (have < quota).any():
        least = have[have > 0].min()
        most = int((have > 0).sum() * least + (have > least).sum())
        raise UsageError(
            f"--subset {count:,} cannot be even: the smallest class has only"
            f" {least:,} images, so at most {most:,} can be drawn"
        )
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(have)[:-1])
    drawn = [rng.permutation(group)[:n] for group, n in zip(by_class, quota, strict=True)]
    return np.sort(np.concatenate(drawn))

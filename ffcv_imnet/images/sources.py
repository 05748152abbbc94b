"""Which source the images come from, and which of them are taken."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.kaggle import SOLUTION, FlatFolder, images_of, solution_of
from ffcv_imnet.images.labels import read_labels
from ffcv_imnet.images.parquet import ParquetShards, shards_of
from ffcv_imnet.images.tar import TarArchive

OFFICIAL = "ILSVRC2012_img_{}.tar"


def open_source(
    split: str,
    data_dir: Path,
    tar: Path | None = None,
    parquet: Path | None = None,
    val_labels: Path | None = None,
) -> ImageSource:
    """The images of `split`: of `tar` or `parquet` if one is given, else of `data_dir`, which holds
    an ImageFolder tree or Kaggle's layout.

    Raises:
        UsageError, RunError: it is not as it should be.
    """
    if tar is not None and parquet is not None:
        raise UsageError("--tar and --parquet exclude each other: give one of them")
    if split == "train" and val_labels is not None:
        raise UsageError("--val_labels goes with --split val")
    if tar is not None:
        check_split(tar, split)
        return TarArchive(tar, read_labels(val_labels) if val_labels else None)
    if parquet is not None:
        if val_labels is not None:
            raise UsageError("--val_labels is not needed with --parquet: the shards hold labels")
        return ParquetShards(shards_of(parquet, split))
    images = images_of(data_dir)
    folder = (images or data_dir) / split
    if split == "val" and (val_labels or (images and _is_flat(folder))):
        labels = val_labels or solution_of(images or data_dir)
        if labels is None:
            raise UsageError(
                f"{folder} holds images side by side and no {SOLUTION} lies near: name their"
                " labels with --val_labels"
            )
        return FlatFolder(folder, read_labels(labels))
    return ImageFolderTree(folder)


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


def _is_flat(folder: Path) -> bool:
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
    if count < classes:
        raise UsageError(f"--subset {count:,} leaves some of the {classes:,} classes empty")
    rng = np.random.default_rng(seed)
    have = np.bincount(labels, minlength=classes)
    each, more = divmod(count, classes)
    # One image more for `more` classes, chosen by lot among those that have it.
    lot = rng.permutation(classes)
    quota = np.full(classes, each)
    quota[lot[np.argsort(have[lot] <= each, kind="stable")][:more]] += 1
    if (have < quota).any():
        most = int(classes * have.min() + (have > have.min()).sum())
        raise UsageError(
            f"--subset {count:,} cannot be even: the smallest class has only"
            f" {have.min():,} images, so at most {most:,} can be drawn"
        )
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(have)[:-1])
    drawn = [rng.permutation(group)[:n] for group, n in zip(by_class, quota, strict=True)]
    return np.sort(np.concatenate(drawn))

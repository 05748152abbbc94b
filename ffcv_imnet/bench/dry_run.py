"""What `train_imagenet.py --dry_run` prints: settings, plan, cost estimate; with --measure what this machine takes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from ffcv_imnet.bench import cost, measure
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schedules import IMAGENET_TRAIN_IMAGES, EpochPlan, plan_run, say_few_steps
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.data.beton import Manifest, manifest_path, read_tables
from ffcv_imnet.data.remote import local_copies
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.models.registry import check_arch
from ffcv_imnet.train.start import describe_start, start_from

SIZES = {"train": IMAGENET_TRAIN_IMAGES, "val": cost.IMAGENET_VAL_IMAGES}  # ImageNet's


def dry_run(settings: Settings, measuring: bool, started: float) -> int:
    """Print what a run would do and cost. Needs neither data nor a GPU, unless it measures.

    `started` is the process's perf_counter() at its start. Returns the exit status.
    """
    check_arch(settings.model.arch)
    price = cost.price(settings.cost)
    settings = replace(settings, data=local_copies(settings.data, manifests_only=not measuring))
    if measuring:
        measured = measure.measure_run(settings, started)
        if measured is not None:
            print(measure.describe(measured, price))
        return 0
    train, val = counted(settings)
    plans = plan_run(settings, train.images)
    print(to_yaml(settings))
    print(f"{train.images:,} training images ({train.source})")
    print(f"{val.images:,} validation images ({val.source})\n")
    if (start := start_from(settings, train.names)) is not None:
        print(describe_start(start.record, train.classes) + "\n")
    print(plan_table(plans))
    say_few_steps(plans, train.images)
    print("\n" + cost.describe(settings, plans, val.images, train.classes))
    return 0


@dataclass(frozen=True)
class Counted:
    """How large a data set is, and who says so."""

    images: int
    names: tuple[str, ...]  # of classes
    source: str

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.names)


def counted(settings: Settings, splits: Sequence[str] = ("train", "val")) -> list[Counted]:
    """Images of the files of `splits`, train first; ImageNet's where one of them is missing, or where
    training would refuse a file as too small, which is said.

    Raises:
        UsageError, RunError: a file is damaged.
    """
    paths = {"train": settings.data.train_dataset, "val": settings.data.val_dataset}
    found = {split: of_file(paths[split]) for split in splits}
    there = [one for one in found.values() if one is not None]
    if len(there) == len(found):
        try:
            plan_run(settings, there[0].images)
            return there
        except UsageError as error:
            print(
                f"training would refuse the images of {there[0].source}: {error}", file=sys.stderr
            )
            why = f"as {there[0].source} is too small"
    else:
        gone = [str(manifest_path(Path(paths[split]))) for split in found if found[split] is None]
        why = f"as {' and '.join(gone)} {'do' if gone[1:] else 'does'} not exist"
    names = tuple(imagenet_names())
    return [Counted(SIZES[split], names, f"ImageNet's number, {why}") for split in splits]


def of_file(path: str) -> Counted | None:
    """What a .beton or its manifest holds; None if neither is there. Raises as `counted`."""
    beton, manifest = Path(path), manifest_path(Path(path))
    if manifest.is_file():
        said = Manifest.load(manifest)
        return Counted(said.samples, said.classes, str(manifest))
    if beton.is_file():
        labels = read_tables(beton).labels
        numbers = map(str, range(1 + int(labels.max(initial=0))))
        return Counted(len(labels), tuple(numbers), str(beton))
    return None


def plan_table(plans: tuple[EpochPlan, ...]) -> str:
    """One row an epoch."""
    columns = "epoch", "px", "batch", "steps", "images", "crop scale", "lr start", "lr end"
    rows = [
        (
            p.epoch,
            p.resolution,
            p.batch_size,
            p.steps,
            f"{p.images:,}",
            "{:g}-{:g}".format(*p.crop_scale),
            f"{p.lr_start:.5f}",
            f"{p.lr_end:.5f}",
        )
        for p in plans
    ]
    return tabulate(rows, columns, disable_numparse=True, stralign="right")

"""What `train_imagenet.py --dry_run` prints: settings, plan, cost estimate; with --measure what this machine takes."""

from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from ffcv_imnet.bench import cost, measure
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schedules import IMAGENET_TRAIN_IMAGES, EpochPlan, plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.data.beton import Manifest, manifest_path, read_tables
from ffcv_imnet.data.remote import local_copies
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.models.registry import check_arch
from ffcv_imnet.train.start import describe_start, start_from


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
    train = counted(settings.data.train_dataset, IMAGENET_TRAIN_IMAGES)
    val = counted(settings.data.val_dataset, cost.IMAGENET_VAL_IMAGES)
    plans = plan_run(settings, train.images)
    print(to_yaml(settings))
    print(f"{train.images:,} training images ({train.source})")
    print(f"{val.images:,} validation images ({val.source})\n")
    if (start := start_from(settings, train.names)) is not None:
        print(describe_start(start.record, train.classes) + "\n")
    print(plan_table(plans))
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


def counted(path: str, images: int) -> Counted:
    """Of the file that is there; ImageNet's `images` and classes where there is none.

    Raises:
        UsageError, RunError: it is damaged.
    """
    beton, manifest = Path(path), manifest_path(Path(path))
    if manifest.is_file():
        said = Manifest.load(manifest)
        return Counted(said.samples, said.classes, str(manifest))
    if beton.is_file():
        labels = read_tables(beton).labels
        numbers = map(str, range(1 + int(labels.max(initial=0))))
        return Counted(len(labels), tuple(numbers), str(beton))
    return Counted(
        images, tuple(imagenet_names()), f"ImageNet's number, as {manifest} does not exist"
    )


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

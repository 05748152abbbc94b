"""What `train_imagenet.py --dry_run` prints: settings, plan, cost estimate; with --measure what this machine takes."""

from pathlib import Path

from tabulate import tabulate

from ffcv_imnet.bench import cost, measure
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schedules import IMAGENET_TRAIN_IMAGES, EpochPlan, plan_run
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.data.beton import Manifest, manifest_path
from ffcv_imnet.models.registry import check_arch


def dry_run(settings: Settings, measuring: bool, started: float) -> int:
    """Print what a run would do and cost. Needs neither data nor a GPU, unless it measures.

    `started` is the process's perf_counter() at its start. Returns the exit status.
    """
    check_arch(settings.model.arch)
    price = cost.price(settings.cost)
    if measuring:
        measured = measure.measure_run(settings, started)
        if measured is not None:
            print(measure.describe(measured, price))
        return 0
    manifest = manifest_path(Path(settings.data.train_dataset))
    if manifest.is_file():
        images, source = Manifest.load(manifest).samples, str(manifest)
    else:
        images, source = IMAGENET_TRAIN_IMAGES, f"ImageNet's number, as {manifest} does not exist"
    plans = plan_run(settings, images)
    print(to_yaml(settings))
    print(f"{images:,} training images ({source})\n")
    print(plan_table(plans))
    print("\n" + cost.describe(settings, plans))
    return 0


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

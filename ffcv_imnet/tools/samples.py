"""Draw what the network is fed: the same images, a row a resolution, as several epochs crop them.

python -m ffcv_imnet samples --config rn_configs/rn18_16ep.yaml
python -m ffcv_imnet samples --beton data/mine/train.beton --config C --out samples.png

The pixels are those of the training loader: seeded crops, mirroring, resizing. Every crop is enlarged
to the same size, so that the small ones show how little they hold.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import EpochPlan, plan_run
from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.paths import check_output, local, path_of
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.beton import check_beton, read_tables
from ffcv_imnet.data.loader import TrainLoader
from ffcv_imnet.images import Pixels
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.machine.distributed import describe_world
from ffcv_imnet.tools import ToolParser

INK, MUTED = "#1b1e23", "#667080"
INCHES = 0.95  # a crop's side
MOST = 100  # images, epochs: more make an image that nothing opens


def main(argv: list[str]) -> int:
    """Write the image and say what it shows. Exit status 0."""
    parser = ToolParser("samples", __doc__)
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="of the run; repeatable")
    add("--beton", type=path_of, metavar="FILE", help="default: the config's data.train_dataset")
    add("--images", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_former("--photographs", "images", type=int)
    add("--epochs", type=int, default=3, metavar="N",
        help="at most, of each resolution (default: %(default)s)")  # fmt: skip
    add(
        "--out",
        type=path_of,
        default=Path("samples.png"),
        metavar="FILE.png",
        help="default: %(default)s",
    )
    options = parser.parse_args(argv)
    check_output("--out", options.out, ".png")
    if not 1 <= min(options.images, options.epochs) <= max(options.images, options.epochs) <= MOST:
        raise UsageError(f"--images and --epochs are from 1 to {MOST}")

    chosen = {"data__train_dataset": options.beton} if options.beton else {}
    settings = load(*options.config, **chosen)
    beton = Path(local(settings.data.train_dataset, "data.train_dataset "))
    manifest = check_beton(beton)
    count = min(options.images, manifest.samples)
    # No step is made, so a file smaller than a batch will do.
    settings = replace(settings, training=replace(settings.training, batch_size=count))
    # Spread over the classes.
    indices = np.linspace(0, manifest.samples - 1, count).astype(np.int64)
    rows = rows_of(plan_run(settings, manifest.samples), options.epochs)
    loader = TrainLoader(str(beton), manifest.samples, settings, describe_world("cpu"))
    crops: list[list[list[Pixels]]] = []
    with Progress(sum(map(len, rows)), "cropping", unit="epoch") as progress:
        for row in rows:
            crops.append([])
            for plan in row:
                crops[-1].append(crops_of(loader, plan, indices))
                progress.update(1)
    classes = [manifest.classes[label] for label in read_tables(beton).labels[indices]]
    names = [imagenet_names().get(name, name) for name in classes]
    draw(rows, crops, names, options.out)
    print(tabulate(
        [(f"{row[0].resolution} px", ", ".join(str(p.epoch) for p in row)) for row in rows],
        ("resolution", "epochs shown"),
    ))  # fmt: skip
    print(f"{count} images of {beton}: {options.out}")
    return 0


def rows_of(plans: Sequence[EpochPlan], epochs: int) -> list[list[EpochPlan]]:
    """For each resolution of the plan, in its order, at most `epochs` of its epochs, spread evenly."""
    by_side: dict[int, list[EpochPlan]] = {}
    for plan in plans:
        by_side.setdefault(plan.resolution, []).append(plan)
    return [
        [every[i] for i in sorted(set(np.linspace(0, len(every) - 1, epochs).astype(int).tolist()))]
        for every in by_side.values()
    ]


def crops_of(loader: TrainLoader, plan: EpochPlan, indices: NDArray[np.int64]) -> list[Pixels]:
    """What an epoch makes of some samples, (side, side, 3) uint8 each, in their order."""
    # Neither crop nor flip depends on the batch.
    small = replace(plan, batch_size=len(indices))
    with closing(loader.epoch(small, only=indices)) as batches:
        images = np.concatenate([pixels.cpu().numpy().copy() for pixels, _ in batches])
    return [np.ascontiguousarray(image.transpose(1, 2, 0)) for image in images]


def draw(
    rows: Sequence[Sequence[EpochPlan]],
    crops: Sequence[Sequence[Sequence[Pixels]]],
    names: Sequence[str],
    path: Path,
) -> None:
    """A PNG: resolutions downwards; images to the right, each under its epochs."""
    wide = max(map(len, rows))
    columns, high = len(names) * wide, len(rows) * 1.25 + 0.4  # in sides of a crop
    figure = Figure(figsize=(INCHES * (columns + 0.9), INCHES * high), facecolor="white")
    left, top = 0.9 / (columns + 0.9), 1 - 0.4 / high
    room = {"left": left, "right": 0.99, "top": top, "bottom": 0.2 / high, "wspace": 0.06}
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=room)
    for axes in grid.flat:
        axes.set_axis_off()
    for of_name, name in zip(grid[0][::wide], names, strict=True):
        short = name if len(name) <= 7 * wide else name[: 7 * wide - 1] + "…"
        of_name.text(0, 1.1, short, transform=of_name.transAxes, color=INK, weight="bold",
                     fontsize=9, parse_math=False)  # fmt: skip
    for line, row, of_row in zip(grid, rows, crops, strict=True):
        line[0].text(-0.1, 0.5, f"{row[0].resolution} px", transform=line[0].transAxes, ha="right",
                     va="center", color=INK, fontsize=9)  # fmt: skip
        for e, (plan, crops_of_plan) in enumerate(zip(row, of_row, strict=True)):
            for axes, pixels in zip(line[e::wide], crops_of_plan, strict=True):
                axes.imshow(pixels, interpolation="nearest")
                axes.set_title(f"epoch {plan.epoch}", y=-0.2, color=MUTED, fontsize=7)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)

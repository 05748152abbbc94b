"""Name what is on images: the five likeliest classes, and with --out an image of them.

python -m ffcv_imnet predict --weights runs/rn18_16ep/best.pt photo.jpg another.png
python -m ffcv_imnet predict --weights model.onnx photo.jpg --out named.png
python -m ffcv_imnet predict --weights model.onnx photos/* --csv named.csv

An image that cannot be read is named on the standard error; the others go on, and the exit
status is 1.
"""

import csv
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from tabulate import tabulate

from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.bounded import read_at_most
from ffcv_imnet.core.errors import RunError, UsageError, in_range
from ffcv_imnet.core.names import shown as shown_name
from ffcv_imnet.core.paths import check_output, path_of, refuse_inputs
from ffcv_imnet.evaluate.weights import add_options, class_names, load_from, parse_preprocess
from ffcv_imnet.images import LARGEST_FILE, Pixels
from ffcv_imnet.images.flat import walk
from ffcv_imnet.images.imagenet import readable
from ffcv_imnet.images.pixels import BadImage, decode_rgb
from ffcv_imnet.images.preprocess import resize_and_crop
from ffcv_imnet.tools import ToolParser

DRAWN = 100  # images on one image: matplotlib draws at most 65,536 px in height
LONGEST = 60  # characters of a name on it
COLUMNS = ("file", "rank", "class", "probability")  # of --csv

Guesses = list[tuple[float, str]]  # probability and class, the likeliest first


class Named(NamedTuple):
    """What the image shows of an image."""

    path: Path
    pixels: Pixels
    guesses: Guesses


def main(argv: list[str]) -> int:
    """Print a table for each image. Exit status 0, or 1 if one of them cannot be read."""
    parser = ToolParser("predict", __doc__)
    add = parser.add_argument
    add("images", type=path_of, nargs="+", metavar="IMAGE", help="or a folder of them")
    add_options(parser)
    add("--resolution", type=in_range(int, 8, 4096), metavar="PX", help="side of the input")
    add("--out", type=path_of, metavar="FILE.png", help="sheet of images and guesses")
    add(
        "--csv", type=path_of, metavar="FILE.csv", help="file, rank, class, probability: a row each"
    )
    options = parser.parse_args(argv)
    out: Path | None = options.out
    check_output("--out", out, ".png")
    check_output("--csv", options.csv, ".csv")
    refuse_inputs("--out", out, options.weights, *options.images)
    refuse_inputs("--csv", options.csv, options.weights, *options.images)
    if options.csv is not None:
        refuse_other_table(options.csv)
    options.images = [image for path in options.images for image in images_of(path)]
    if out is not None and len(options.images) > DRAWN:
        raise UsageError(f"--out draws at most {DRAWN} images, not {len(options.images):,}")
    network = load_from(options)
    how = parse_preprocess(network, options.resolution, options)
    names = class_names(network)
    print(f"{options.weights}: {network.origin}; {how.resolution} px")
    shown, table, bad = list[Named](), list[tuple[str, int, str, float]](), 0
    for path in options.images:
        try:
            rgb = read(path)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            bad += 1
            continue
        guesses = guess(network.model, resize_and_crop(rgb, how), names)
        rows = [(f"{probability:.4f}", name) for probability, name in guesses]
        print(f"\n{path}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}", flush=True)
        table += [
            (shown_name(str(path)), rank, name, round(p, 6))
            for rank, (p, name) in enumerate(guesses, 1)
        ]
        if out is not None:
            step = max(1, max(rgb.shape) // 500)  # no more pixels than are drawn
            shown.append(Named(path, rgb[::step, ::step].copy(), guesses))
    if options.csv is not None and table:
        with atomic_write(options.csv, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(table)
    if out is not None and shown:
        draw(shown, out)
        print(f"\nimage: {out}")
    return 1 if bad else 0


def images_of(path: Path) -> list[Path]:
    """`path`, or the images in it and its folders, if it is one. Raises UsageError where it has none."""
    if not path.is_dir():
        return [path]
    if not (found := walk(path)[0]):
        raise UsageError(f"{path}: a folder without images")
    return [path / os.fsdecode(name) for name in found]


def refuse_other_table(path: Path) -> None:
    """Raises UsageError where --csv would replace a file that this tool has not written."""
    with suppress(FileNotFoundError):
        with path.open("rb") as file:
            begin = file.read(200)
        if begin and begin.split(b"\n")[0].strip() != ",".join(COLUMNS).encode():
            raise UsageError(
                f"--csv {path} is there and is not a table of predictions: name another file"
            )


def read(path: Path) -> Pixels:
    """An image's pixels. Raises RunError if there is none or it is damaged."""
    try:
        return decode_rgb(read_at_most(path, LARGEST_FILE))
    except OSError as error:
        raise RunError(f"{path}: the image cannot be read ({error.strerror or error})") from error
    except BadImage as error:
        raise RunError(f"{path}: the image cannot be read ({error})") from error


@torch.no_grad()
def guess(model: torch.nn.Module, pixels: Pixels, names: tuple[str, ...]) -> Guesses:
    """The five likeliest classes of (H, W, 3) uint8 pixels."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    logits = model(image)[0].double()
    if not logits.isfinite().all():
        raise RunError("the network gives NaN or infinite values: its weights are lost")
    best = logits.softmax(0).topk(min(5, len(names)))
    return [
        (float(p), readable(names[int(i)])) for p, i in zip(best.values, best.indices, strict=True)
    ]


def draw(shown: list[Named], path: Path) -> None:
    """A row an image: the image, and bars of its classes' probabilities."""
    text = "".join(name for one in shown for name in (one.path.name, *(n for _, n in one.guesses)))
    style = {"fontsize": 9, "color": "#333333", "family": fonts_for(text), "parse_math": False}
    figure = Figure(figsize=(9, 2.6 * len(shown)), layout="constrained", facecolor="white")
    rows = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1, 1.6))
    for (left, right), one in zip(rows, shown, strict=True):
        left.imshow(one.pixels)
        left.set_axis_off()
        left.set_title(short(one.path.name), loc="left", **style)
        found = one.guesses[::-1]
        right.barh(range(len(found)), [p for p, _ in found], color="#56b4e9")
        for row, (probability, label) in enumerate(found):
            right.text(0.01, row, f"{probability:.1%}  {short(label)}", va="center", **style)
        right.set_xlim(0, 1)
        right.set_axis_off()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def short(name: str) -> str:
    """`name`, cut to what fits beside a bar."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def fonts_for(text: str) -> list[str]:
    """Families that together have the letters of `text`: matplotlib's own, then those installed."""
    families = ["DejaVu Sans"]
    own = font_manager.findfont(families[0])
    missing = {ord(letter) for letter in text} - set(font_manager.get_font(own).get_charmap())
    for font in font_manager.fontManager.ttflist if missing else []:
        have = missing & set(font_manager.get_font(font.fname).get_charmap())
        if have:
            families.append(font.name)
            missing -= have
        if not missing:
            break
    return families

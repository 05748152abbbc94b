"""Name what is on photographs: the five likeliest classes, and with --out a picture of them.

python -m ffcv_imnet predict --weights runs/rn18_16ep/best.pt photo.jpg another.png
python -m ffcv_imnet predict --weights model.onnx photo.jpg --out named.png
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from ffcv_imnet.errors import RunError, UsageError
from ffcv_imnet.images import Pixels
from ffcv_imnet.images.imagenet import readable
from ffcv_imnet.images.pixels import BadImage, decode_rgb
from ffcv_imnet.images.preprocess import resize_and_crop
from ffcv_imnet.models.weights import (
    class_names,
    load_network,
    parse_channels,
    parse_preprocess,
)
from ffcv_imnet.tools import ToolParser

Guesses = list[tuple[float, str]]  # probability and class, the likeliest first


def main(argv: list[str]) -> int:
    """Print a table for each photograph. Exit status 0."""
    parser = ToolParser("predict", __doc__)
    add = parser.add_argument
    add("photos", type=Path, nargs="+", metavar="PHOTO")
    add("--weights", type=Path, required=True, help="checkpoint, state dict, .safetensors or .onnx")
    add("--out", type=Path, metavar="FILE.png", help="picture of photographs and guesses")
    add("--resolution", type=int, metavar="PX", help="side of the input")
    add("--crop_ratio", type=float, metavar="R", help="that side over the resized shorter side")
    add("--interpolation", metavar="NAME", help="bilinear, bicubic, box or lanczos")
    add("--mean", metavar="M", help="one or three numbers, 0 to 255; default: ImageNet's")
    add("--std", metavar="S", help="likewise")
    add("--arch", metavar="NAME", help="of a state dict: name here, in torchvision or timm")
    add("--plain", action="store_true", help="the plain weights of a run that averaged them")
    options = parser.parse_args(argv)
    out: Path | None = options.out
    if out is not None and (out.suffix.lower() != ".png" or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: name a .png file in a folder that exists")
    photos = {path: read(path) for path in options.photos}  # all, before the weights
    network = load_network(
        options.weights, arch=options.arch, plain=options.plain,
        mean=parse_channels(options.mean, "--mean"), std=parse_channels(options.std, "--std"),
    )  # fmt: skip
    how = parse_preprocess(network, options.resolution, options.crop_ratio, options.interpolation)
    names = class_names(network)
    print(f"{options.weights}: {network.origin}; {how.resolution} px")
    guesses = {}
    for path, rgb in photos.items():
        guesses[path] = guess(network.model, resize_and_crop(rgb, how), names)
        rows = [(f"{probability:.4f}", name) for probability, name in guesses[path]]
        print(f"\n{path}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}")
    if out is not None:
        draw(photos, guesses, out)
        print(f"\npicture: {out}")
    return 0


def read(path: Path) -> Pixels:
    """A photograph's pixels. Raises UsageError if there is none, RunError if it is damaged."""
    if not path.is_file():
        raise UsageError(f"{path}: no such photograph")
    try:
        return decode_rgb(path.read_bytes())
    except (OSError, BadImage) as error:
        raise RunError(f"{path}: the photograph cannot be read ({error})") from error


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


def draw(photos: dict[Path, Pixels], guesses: dict[Path, Guesses], path: Path) -> None:
    """A row a photograph: the photograph, and bars of its classes' probabilities."""
    figure = Figure(figsize=(9, 2.6 * len(photos)), layout="constrained", facecolor="white")
    rows = figure.subplots(len(photos), 2, squeeze=False, width_ratios=(1, 1.6))
    for (left, right), (name, rgb) in zip(rows, photos.items(), strict=True):
        left.imshow(rgb)
        left.set_axis_off()
        left.set_title(name.name, fontsize=9, color="#333333", loc="left")
        found = guesses[name][::-1]
        right.barh(range(len(found)), [p for p, _ in found], color="#56b4e9")
        for row, (probability, label) in enumerate(found):
            right.text(0.01, row, f"{probability:.1%}  {label}", va="center", fontsize=9,
                       color="#333333")  # fmt: skip
        right.set_xlim(0, 1)
        right.set_axis_off()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)

"""Decode a folder of small images once: FOLDER/{train,val}/CLASS/IMAGE -> OUT/{train,val}_{images,labels}.npy.

python records/2026-11-25_transfer/pack.py FOLDER OUT --side 64

Images are uint8 (n, 3, side, side), shrunk to `side` where they are larger (the whole of square images); labels int64.
The order within the training set is a fixed shuffle, class by class in turn, so that the first N images are a
class-balanced subset, and smaller subsets lie in larger ones. Validation images likewise: the first
half is what is chosen on, the second what is reported on.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image


def in_turn(folder: Path) -> list[tuple[Path, int]]:
    """All images, shuffled within their class, one of every class in turn."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    ranked = []
    for label, path in enumerate(classes):
        images = sorted(path.iterdir())
        random.Random(f"transfer {path.name}").shuffle(images)
        ranked += [((rank, label), image) for rank, image in enumerate(images)]
    return [(image, key[1]) for key, image in sorted(ranked)]


def pack(folder: Path, out: Path, side: int) -> None:
    """Write both sets."""
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        listed = in_turn(folder / part)
        images = np.empty((len(listed), 3, side, side), np.uint8)
        for index, (path, _) in enumerate(listed):
            image = Image.open(path).convert("RGB")
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BOX)
            images[index] = np.asarray(image).transpose(2, 0, 1)
        np.save(out / f"{part}_images.npy", images)
        np.save(out / f"{part}_labels.npy", np.array([label for _, label in listed]))
        print(f"{len(listed):,} images in {out / part}_images.npy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=64)
    options = parser.parse_args()
    pack(options.folder, options.out, options.side)

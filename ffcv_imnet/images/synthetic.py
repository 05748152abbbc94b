"""The embedded data set: ten kinds of shapes that only a network which works can tell apart.

A small colour image shows one shape under a random position, size, rotation and stretch, in a
colour that may be darker or lighter than what lies behind it, over gradients, lines, blobs and
noise. No pixel says anything about the class, so a linear classifier on pixels stays near chance
(tests/test_shapes.py), while ResNet-18 learns it in minutes on a CPU.

Every image is a function of (seed, split, class, index) alone: it does not depend on how many are
made nor in which order.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ffcv_imnet.core.atomic import partial_path, rename
from ffcv_imnet.core.bounded import read_json
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.progress import Progress

SPLITS = ("train", "val")
COMPLETE = "shapes.json"  # written last: a tree without it is not whole
SUPERSAMPLING = 3  # drawn this many times larger, then averaged down: smooth edges
JPEG_QUALITY = 95

Polygon = list[tuple[float, float]]


# ---- the ten classes: closed outlines about the origin, reaching to about radius 1 --------------


def _around(count: int, radius: Callable[[int], float], start: float = 0.0) -> Polygon:
    """`count` points at equal angles, the i-th at distance `radius(i)`."""
    angles = (start + 2 * math.pi * i / count for i in range(count))
    return [(radius(i) * math.cos(a), radius(i) * math.sin(a)) for i, a in enumerate(angles)]


def _ribbon(middle: Polygon, width: float) -> Polygon:
    """The outline of a band of `width` along the curve `middle`."""
    points = np.asarray(middle)
    along = np.gradient(points, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    across *= width / 2 / np.linalg.norm(across, axis=1, keepdims=True)
    both = np.concatenate([points + across, (points - across)[::-1]])
    return [(float(x), float(y)) for x, y in both]


def _ring() -> Polygon:
    turn = np.linspace(0, 2 * math.pi, 61)
    return _ribbon([(0.8 * math.cos(t), 0.8 * math.sin(t)) for t in turn], 0.4)


def _crescent() -> Polygon:
    outer = [(math.cos(t), math.sin(t)) for t in np.linspace(0.9, 2 * math.pi - 0.9, 50)]
    tip_x, tip_y = outer[0]  # the inner arc, about (0.45, 0), runs back through both tips
    reach = math.atan2(tip_y, tip_x - 0.45)
    radius = math.hypot(tip_x - 0.45, tip_y)
    back = np.linspace(2 * math.pi - reach, reach, 50)
    return outer + [(0.45 + radius * math.cos(t), radius * math.sin(t)) for t in back]


def _heart() -> Polygon:
    """The usual parametric heart, for instance https://mathworld.wolfram.com/HeartCurve.html."""
    points = []
    for t in np.linspace(0, 2 * math.pi, 60, endpoint=False):
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 16, -(y + 2.5) / 16))
    return points


def _spiral() -> Polygon:
    turns = np.linspace(0.6, 2 * math.pi * 2.1, 120)
    reach = float(turns[-1])
    return _ribbon([(t / reach * math.cos(t), t / reach * math.sin(t)) for t in turns], 0.2)


_ARROW = [(-1, -0.22), (0.15, -0.22), (0.15, -0.7), (1, 0), (0.15, 0.7), (0.15, 0.22), (-1, 0.22)]
_CROSS = [(1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)]
_CROSS += [(-x, -y) for x, y in _CROSS]

OUTLINES: dict[str, Polygon] = {
    "arrow": [(float(x), float(y)) for x, y in _ARROW],
    "circle": _around(48, lambda i: 0.9),
    "crescent": _crescent(),
    "cross": [(float(x), float(y)) for x, y in _CROSS],
    "heart": _heart(),
    "ring": _ring(),
    "spiral": _spiral(),
    "square": _around(4, lambda i: 1.15),
    "star": _around(10, lambda i: 1.1 if i % 2 == 0 else 0.45),
    "triangle": _around(3, lambda i: 1.2),
}
CLASSES = tuple(OUTLINES)  # sorted, so that the index is ImageFolder's


# ---- one image --------------------------------------------------------------------------------


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours (float, 0 to 255) of clearly different lightness, either one the lighter."""
    while True:
        first, second = rng.uniform(0, 255, (2, 3))
        if abs(first.mean() - second.mean()) > 90:
            return first, second


def _gradient(rng: np.random.Generator, colour: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """An image of `size` (width, height), enlarged, that runs from `colour` to a neighbour of it."""
    width, height = size
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-1, 1, width)[None, :, None] * math.cos(angle)
    y = np.linspace(-1, 1, height)[:, None, None] * math.sin(angle)
    image = colour + (x + y) * rng.uniform(-35, 35, 3)
    small = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    return small.resize((width * SUPERSAMPLING, height * SUPERSAMPLING), Image.Resampling.NEAREST)


def _clutter(rng: np.random.Generator, pen: ImageDraw.ImageDraw, count: int) -> None:
    """`count` lines and blobs of any colour, small beside the shape."""
    width, height = pen.im.size
    span = min(width, height)
    for is_line in rng.random(count) < 0.5:
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        dx, dy = rng.uniform(-0.5, 0.5, 2) * span
        if is_line:
            pen.line((x, y, x + dx, y + dy), fill=colour, width=int(rng.uniform(0.01, 0.03) * span))
        else:
            rx, ry = rng.uniform(0.02, 0.08, 2) * span
            pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def _place(rng: np.random.Generator, outline: Polygon, size: tuple[int, int]) -> Polygon:
    """`outline` scaled, stretched, rotated, perhaps mirrored, somewhere within `size`, in pixels."""
    radius = rng.uniform(0.34, 0.46) * min(size)
    turn = rng.uniform(0, 2 * math.pi)
    stretch = np.diag([rng.uniform(0.85, 1.15), rng.choice([-1.0, 1.0])])
    rotate = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    middle = [rng.uniform(1.02 * radius, side - 1.02 * radius) for side in size]
    points = radius * np.asarray(outline) @ stretch @ rotate.T + middle
    return [(float(x), float(y)) for x, y in points]


def draw(
    class_index: int, key: tuple[int, ...], size: tuple[int, int] | None = None
) -> Image.Image:
    """One image of class `CLASSES[class_index]`, pixel for pixel a function of the arguments.

    Args:
        class_index: 0 to 9.
        key: non-negative integers, the entropy of the random stream (numpy's SeedSequence hashes
            them): images with different keys are independent.
        size: (width, height) in pixels; by default drawn from the key, 72 to 96 by 64 to 80.

    Returns: an RGB image.
    """
    rng = np.random.Generator(np.random.PCG64([*key, class_index]))
    width, height = size or (int(rng.integers(72, 97)), int(rng.integers(64, 81)))
    large = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    back, front = _colours(rng)

    canvas = _gradient(rng, back, (width, height))
    _clutter(rng, ImageDraw.Draw(canvas), int(rng.integers(3, 8)))
    mask = Image.new("L", large)
    ImageDraw.Draw(mask).polygon(_place(rng, OUTLINES[CLASSES[class_index]], large), fill=255)
    canvas.paste(_gradient(rng, front, (width, height)), mask=mask)
    _clutter(rng, ImageDraw.Draw(canvas), int(rng.integers(0, 3)))  # some of it in front

    image = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0, 8)
    return Image.fromarray((image + noise).round().clip(0, 255).astype(np.uint8))


# ---- the tree -----------------------------------------------------------------------------------


def write_tree(root: Path, train_per_class: int, val_per_class: int, seed: int = 0) -> bool:
    """Write `ROOT/{train,val}/<class>/<class>_00012.jpg`, as torchvision's ImageFolder wants it.

    It is built under another name and renamed when whole; a tree made with the same arguments by the
    same drawing is recognised and left, another one is replaced.

    Returns: True if it was written, False if it was there already.
    Raises:
        UsageError: `root` is there and is not a tree of shapes.
    """
    one_of_each = b"".join(draw(index, (seed, 0, 0)).tobytes() for index in range(len(CLASSES)))
    made_from = {
        "train": train_per_class,
        "val": val_per_class,
        "seed": seed,
        "drawing": hashlib.sha256(one_of_each).hexdigest(),  # another once `draw` is changed
    }
    marker = root / COMPLETE
    found: Any = None
    with suppress(OSError, ValueError):
        found = read_json(marker)
    if found == made_from:
        return False
    if isinstance(found, dict):
        shutil.rmtree(root)
    elif root.exists():
        raise UsageError(
            f"{root} is there already and is not a tree of shapes: remove it or name another folder"
        )
    partial = partial_path(root)
    shutil.rmtree(partial, ignore_errors=True)
    counts = dict(zip(SPLITS, (train_per_class, val_per_class), strict=True))
    with Progress(len(CLASSES) * sum(counts.values()), "drawing shapes") as progress:
        for split_index, split in enumerate(SPLITS):
            for class_index, name in enumerate(CLASSES):
                folder = partial / split / name
                folder.mkdir(parents=True)
                for i in range(counts[split]):
                    image = draw(class_index, (seed, split_index, i))
                    image.save(folder / f"{name}_{i:05d}.jpg", quality=JPEG_QUALITY)
                    progress.update(1)
    (partial / COMPLETE).write_text(json.dumps(made_from) + "\n")
    rename(partial, root)
    return True

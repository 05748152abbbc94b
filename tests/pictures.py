"""Generated images for the tests of the writer, and sources that misbehave."""

import os
import signal
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ffcv_imnet.images.folder import ImageFolderTree


def picture(seed: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """(height, width, 3) smooth random colours, which JPEG keeps nearly unchanged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth, dtype=np.uint8)


def save(path: Path, pixels: NDArray[np.uint8], **how: object) -> None:
    """Write `pixels` in the format that the name's ending says, JPEG at quality 95."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        how = {"format": "JPEG", "quality": 95, **how}
    Image.fromarray(pixels).save(path, **how)  # type: ignore[arg-type]


def make_tree(root: Path, counts: tuple[int, ...] = (5, 4, 6), split: str = "train") -> Path:
    """An ImageFolder tree of JPEGs of various sizes under `root`/`split`; the root again."""
    seed = 0
    for label, count in enumerate(counts):
        for _ in range(count):
            name = f"n{label:08d}/n{label:08d}_{seed:04d}.JPEG"
            save(root / split / name, picture(seed, 40 + seed % 7, 60 - seed % 5))
            seed += 1
    return root


def make_slow_tree(root: Path, count: int = 200) -> Path:
    """A tree of one big image under many names, one of them in a second class: seconds of work,
    an instant to make."""
    first = root / "train" / "a" / "0.jpg"
    save(first, picture(0, 1200, 1200))
    for number in range(1, count - 1):
        os.link(first, first.with_name(f"{number}.jpg"))
    (root / "train" / "b").mkdir()
    os.link(first, root / "train" / "b" / "0.jpg")
    return root


def of_many_scans(count: int, side: int = 8) -> bytes:
    """A sound progressive JPEG, grey, of `count` scans: every coefficient by itself, bit by bit.

    At most 883; encoders make ten, libjpeg's at most 100.
    """
    tables = b"\xff\xdb\x00\x43\x00" + 64 * b"\x01"
    frame = b"\xff\xc2\x00\x0b\x08" + 2 * side.to_bytes(2, "big") + b"\x01\x01\x11\x00"
    for kind in (b"\x00", b"\x10"):  # one code of one bit: no difference, end of block
        tables += b"\xff\xc4\x00\x14" + kind + b"\x01" + 15 * b"\x00" + b"\x00"
    scans = [(0, 0)]
    for place in range(1, 64):
        scans += [(place, 13), *((place, (bit + 1) << 4 | bit) for bit in reversed(range(13)))]
    blocks = -((-side // 8) ** 2)
    zeros = (blocks // 8) * b"\x00" + bytes([0xFF >> blocks % 8]) * (blocks % 8 > 0)
    data = b"".join(
        b"\xff\xda\x00\x08\x01\x01\x00" + bytes([place, place, bits]) + zeros
        for place, bits in scans[:count]
    )
    return b"\xff\xd8" + tables + frame + data + b"\xff\xd9"


class Deadly(ImageFolderTree):
    """Reading kills the process, as the kernel does when memory is short."""

    def read(self, index: int) -> tuple[bytes, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)

"""What a .beton stores of each image, computed in worker processes, handed back in order.

ffcv's own writer is not used: a bad sample or a killed worker makes it wait for ever, and the
layout of its file depends on timing.
"""

import functools
import hashlib
import struct
from collections.abc import Generator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.parallel import in_order
from ffcv_imnet.images.pixels import (
    LONGEST,
    MAX_PIXELS,
    BadImage,
    decode_rgb,
    encode_jpeg,
    has_plain_edge,
    is_partly_lost,
    shrink,
)
from ffcv_imnet.images.stored import JPEG, RAW, Stored, sample_digest


@dataclass(frozen=True)
class PixelSettings:
    """How an image is stored. Sides in pixels, at most one of the two set; None leaves the size."""

    max_resolution: int | None = 400
    short_side: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 1.0
    seed: int = 0
    max_pixels: int = MAX_PIXELS  # of an image that is read; decides only what is refused


@dataclass(frozen=True)
class Bad:
    """One image that cannot be stored, by its source's name."""

    name: str
    reason: str


def as_jpeg(seed: int, index: int, probability: float) -> bool:
    """Whether image `index` is stored as JPEG: a function of (seed, index), not of call order."""
    key = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
    return int.from_bytes(key, "little") < probability * 2.0**64


def encode_image(
    source: ImageSource, index: int, number: int, settings: PixelSettings, limit: int
) -> Stored | Bad:
    """Read, decode, shrink and encode one image.

    Args:
        index: the image's place in `source`.
        number: its place in the whole order, which decides between JPEG and raw.
        limit: largest number of bytes that one image may take in the file.
    """
    try:
        data, label = source.read(index)
        rgb = decode_rgb(data, settings.max_pixels) if isinstance(data, bytes) else data
        # Of what ends early an edge is gray; to look at all JPEGs so would take a quarter more of the time.
        lost = has_plain_edge(rgb) and isinstance(data, bytes) and is_partly_lost(data)
        rgb = shrink(rgb, settings.max_resolution, settings.short_side)
        height, width = rgb.shape[:2]
        if max(height, width) > LONGEST:
            raise BadImage(f"{width} x {height} pixels: ffcv stores sides up to {LONGEST}")
        jpeg = as_jpeg(settings.seed, number, settings.compress_probability)
        stored = encode_jpeg(rgb, settings.jpeg_quality) if jpeg else rgb.tobytes()
        if len(stored) > limit:
            raise BadImage(
                f"{width} x {height} pixels take {len(stored):,} bytes, more than a page of"
                f" {limit:,}: store it smaller (--max_resolution, --compress_probability 1)"
            )
    except (BadImage, cv2.error) as bad:
        return Bad(source.name(index), " ".join(str(bad).split()))
    except OSError as error:
        return Bad(source.name(index), error.strerror or str(error))
    mode = JPEG if jpeg else RAW
    read = hashlib.blake2b(
        data if isinstance(data, bytes) else data.tobytes(), digest_size=8
    ).digest()
    digest = sample_digest(label, stored)
    return Stored(label, mode, height, width, stored, digest, int.from_bytes(read, "little"), lost)


def encode_chunk(
    part: ImageSource, numbers: NDArray[np.int64], settings: PixelSettings, limit: int
) -> list[Stored | Bad]:
    """`encode_image` for all of `part`, whose images have these numbers in the whole order."""
    return [
        encode_image(part, index, number, settings, limit)
        for index, number in enumerate(numbers.tolist())
    ]


def encode_all(
    source: ImageSource,
    settings: PixelSettings,
    limit: int,
    num_workers: int,
    order: NDArray[np.int64] | None = None,
) -> Generator[list[Stored | Bad], None, None]:
    """All images of `source`, in `order` if one is given; see `parallel.in_order`."""
    work = functools.partial(encode_chunk, settings=settings, limit=limit)
    return in_order(source, work, num_workers, order)

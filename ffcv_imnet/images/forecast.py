"""What a few images, encoded beforehand, promise for all: bytes and seconds."""

import time
from dataclasses import dataclass

import numpy as np

from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.encode import PixelSettings, encode_image
from ffcv_imnet.images.stored import PAGE_SIZE, Stored

ESTIMATE_FROM = 64  # images encoded
TABLES = 48  # bytes a sample of metadata and allocation table


@dataclass(frozen=True)
class Forecast:
    """What a few images, encoded beforehand, promise for all."""

    bytes: int
    seconds: float  # of one process


def forecast(source: ImageSource, settings: PixelSettings) -> Forecast:
    """Encode a seeded sample of `source` and extrapolate; unreadable images are passed over."""
    count = min(ESTIMATE_FROM, len(source))
    chosen = np.random.default_rng(settings.seed).choice(len(source), count, replace=False)
    sizes = []
    started = time.perf_counter()
    for index in np.sort(chosen).tolist():
        done = encode_image(source, index, index, settings, PAGE_SIZE)
        if isinstance(done, Stored):
            sizes.append(len(done.data))
    seconds = (time.perf_counter() - started) / count
    mean = sum(sizes) / max(1, len(sizes))
    # Pages start on their own boundary: up to a page in front of the first.
    total = int(mean * len(source)) + TABLES * len(source) + PAGE_SIZE
    return Forecast(total, seconds * len(source))

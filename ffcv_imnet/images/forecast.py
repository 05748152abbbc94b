"""What a few images, encoded beforehand, promise for all: bytes and seconds, in words for a person."""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


def available_memory() -> int | None:
    """Bytes that the page cache may still take, within a container's limit; None if unknown."""
    with suppress(OSError, AttributeError, ValueError):
        meminfo = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s*(\d+) kB", meminfo).group(1)) * 1024  # type: ignore[union-attr]
        with suppress(OSError, ValueError):  # "max" where there is no limit
            free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return free
    return None


def size(count: float) -> str:
    """Bytes in the unit that disks are sold in."""
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000 or unit == "GB":
            break
    return f"{count:,.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"

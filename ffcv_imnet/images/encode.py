"""What a .beton stores of each image, computed in worker processes, handed back in order.

ffcv's own writer is not used: a bad sample or a killed worker makes it wait for ever, and the
layout of its file depends on timing.
"""

import hashlib
import multiprocessing
import os
import signal
import struct
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import cv2
import numpy as np

from ffcv_imnet.errors import RunError
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.pixels import LONGEST, BadImage, decode_rgb, encode_jpeg, shrink
from ffcv_imnet.stored import JPEG, RAW, Stored, sample_digest

CHUNK = 16  # images a task: enough to hide its cost, few enough to keep the window small
WINDOW = 16  # tasks in flight at least: results are taken in order, and one may be all huge photos


@dataclass(frozen=True)
class PixelSettings:
    """How an image is stored. Sides in pixels, at most one of the two set; None leaves the size."""

    max_resolution: int | None = 400
    short_side: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 1.0
    seed: int = 0


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
        source: where `index` is read.
        index: the image's place in `source`.
        number: its place in the whole order, which decides between JPEG and raw.
        settings: how to store it.
        limit: largest number of bytes that one image may take in the file.
    """
    try:
        data, label = source.read(index)
        rgb = decode_rgb(data) if isinstance(data, bytes) else data
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
    return Stored(label, mode, height, width, stored, sample_digest(label, stored))


def encode_chunk(
    part: ImageSource, first: int, settings: PixelSettings, limit: int
) -> list[Stored | Bad]:
    """`encode_image` for all of `part`, whose images are number `first` and on in the order."""
    return [encode_image(part, i, first + i, settings, limit) for i in range(len(part))]


def encode_all(
    source: ImageSource, settings: PixelSettings, limit: int, num_workers: int
) -> Generator[list[Stored | Bad], None, None]:
    """All images of `source` in order, a few at a time, encoded by `num_workers` processes.

    Memory is bounded by the window of chunks in flight. Close the iterator to stop early: its
    workers are then killed, whatever they are doing.

    Raises:
        RunError: a worker died or ran out of memory.
    """
    others = set(multiprocessing.active_children())
    # spawn: the caller may have threads, and a forked copy of a held lock never opens.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    pending: deque[Future[list[Stored | Bad]]] = deque()
    starts = iter(range(0, len(source), CHUNK))
    finished = False

    def submit(count: int) -> None:
        for _, first in zip(range(count), starts, strict=False):
            part = source.subset(np.arange(first, min(first + CHUNK, len(source))))
            pending.append(pool.submit(encode_chunk, part, first, settings, limit))

    try:
        # Workers start here and inherit the mask, so Ctrl-C reaches this process alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            submit(max(WINDOW, 3 * num_workers))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while pending:
            chunk = pending.popleft().result()
            submit(1)
            yield chunk
        finished = True
    except (BrokenProcessPool, MemoryError):
        raise RunError(
            "a worker process died while encoding, probably for want of memory:"
            f" try fewer than --num_workers {num_workers}"
        ) from None
    finally:
        if not finished:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def one_thread() -> None:
    """One thread for OpenCV in this process: the workers are the parallelism."""
    cv2.setNumThreads(0)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one_thread()
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    # A killed parent leaves no end-of-file on the pool's queues: its workers would stay for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

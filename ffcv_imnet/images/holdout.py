"""Which images of a data set without a validation split are held out for it.

Images of the same bytes go the same way, whatever their names and classes: a copy on the other side
would be validated on after it was trained on. Which way is a function of the seed and the content, so
that adding images hardly moves others.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing, suppress

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.parallel import in_order


def hold_out(
    source: ImageSource,
    fraction: float,
    seed: int,
    num_workers: int,
    order: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """(len(source),), true for those to validate on: this `fraction` of each class, at least one.

    All images are read, in this `order`, by `num_workers` processes.

    Raises:
        UsageError: a class has not two different images.
        RunError: a worker died.
    """
    contents = [b""] * len(source)
    places = iter(order.tolist())
    with (
        closing(in_order(source, digests, num_workers, order)) as chunks,
        Progress(len(source), "reading for --holdout") as progress,
    ):
        for chunk in chunks:
            for digest in chunk:
                contents[next(places)] = digest
            progress.update(len(chunk))
    return choose(contents, source.labels, source.classes, fraction, seed)


def digests(part: ImageSource, _: NDArray[np.int64]) -> list[bytes]:
    """Of the files of `part`; of one that cannot be read, which its writing will say, of its name."""
    found = []
    for index in range(len(part)):
        data: bytes = part.name(index).encode(errors="surrogateescape")
        with suppress(OSError):
            read = part.read(index)[0]
            data = read if isinstance(read, bytes) else read.tobytes()
        found.append(hashlib.blake2b(data, digest_size=16).digest())
    return found


def choose(
    contents: Sequence[bytes],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    fraction: float,
    seed: int,
) -> NDArray[np.bool_]:
    """True for validation. Whole groups of one content are taken, in an order that seed and content
    say, while none of their classes has more than its share; then, for a class that has none yet, the
    smallest group that leaves every class something to train on."""
    counts = np.bincount(labels, minlength=len(classes))
    share = np.clip(np.rint(fraction * counts), 1, np.maximum(counts - 1, 0)).astype(np.int64)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        groups[content].append(index)
    key = seed.to_bytes(8, "little")
    ranked = sorted(groups, key=lambda c: hashlib.blake2b(c, key=key, digest_size=16).digest())
    held = np.zeros(len(classes), np.int64)
    chosen = np.zeros(len(labels), bool)

    def take(content: bytes, most: NDArray[np.int64]) -> bool:
        members = labels[groups[content]]
        of, more = np.unique(members, return_counts=True)
        if chosen[groups[content][0]] or (held[of] + more > most[of]).any():
            return False
        held[of] += more
        chosen[groups[content]] = True
        return True

    for content in ranked:
        take(content, share)
    for label in np.flatnonzero((held == 0) & (counts > 0)).tolist():
        own = [content for content in ranked if label in labels[groups[content]]]
        own.sort(key=lambda content: len(groups[content]))
        if not held[label] and not any(take(content, counts - 1) for content in own):
            break
    lacking = [name for name, a, b in zip(classes, counts, held, strict=True) if a and not b]
    if lacking:
        raise UsageError(
            f"{len(lacking):,} of {len(classes):,} classes have not two different images, one to train"
            f" and one to validate on, for instance {', '.join(lacking[:3])}: add images, or leave the"
            " class out"
        )
    return chosen

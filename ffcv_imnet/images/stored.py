"""One image as a .beton stores it: what the encoding processes hand to the writer."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

JPEG, RAW = 0, 1  # ffcv.fields.rgb_image.IMAGE_MODES
PAGE_SIZE = 1 << 23  # 8 MiB, ffcv's default; a sample never crosses a page


@dataclass(frozen=True)
class Stored:
    """A label and an image of `height` x `width` pixels, encoded.

    `data` is a JPEG file, or with `mode` RAW the height x width x 3 bytes of RGB rows; `digest` is
    its `sample_digest`.
    """

    label: int
    mode: int
    height: int
    width: int
    data: bytes
    digest: bytes
    content: int = 0  # 64 bits of a digest of the image file, by which copies of it are found
    partly_lost: bool = False  # see `pixels.is_partly_lost`


def checksum(*parts: NDArray[Any] | bytes) -> str:
    """`sha256:` and, in hexadecimal, the digest of the bytes of all parts, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return f"sha256:{digest.hexdigest()}"


def sample_digest(label: int, data: bytes) -> bytes:
    """sha256 over the label as little-endian int64 and the stored bytes; 32 bytes.

    The content checksum of a .beton is the sha256 of all its samples' digests in index order, so
    it can be computed in parallel and does not depend on where in the file an image lies.
    """
    digest = hashlib.sha256(label.to_bytes(8, "little", signed=True))
    digest.update(data)
    return digest.digest()

"""A .beton whose tables say something else, with a manifest made to fit: checksums prove nothing."""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.data.beton import ALLOCATION, DESCRIPTORS, HEADER, METADATA, BetonWriter
from ffcv_imnet.data.manifest import Manifest, manifest_path
from ffcv_imnet.images.pixels import encode_jpeg
from ffcv_imnet.images.stored import JPEG, RAW, Stored, sample_digest
from ffcv_imnet.images.stored import checksum as _checksum
from tests.pictures import picture

HUGE = [0, 1, 7, 8, 1 << 12, 1 << 23, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]


CLASSES = ("ant", "bee", "cat")
SAMPLES = 12


def write_sound(path: Path) -> None:
    """A .beton of a dozen small images, every third raw, and its manifest."""
    digests = []
    with path.open("wb") as file:
        writer = BetonWriter(file, SAMPLES, 1 << 16)
        for number in range(SAMPLES):
            pixels = picture(number, 20 + number, 30)
            data, mode = encode_jpeg(pixels, 90), JPEG
            if number % 3 == 0:
                data, mode = pixels.tobytes(), RAW
            label = number % len(CLASSES)
            digests.append(sample_digest(label, data))
            height, width = pixels.shape[:2]
            writer.add(Stored(label, mode, height, width, data, digests[-1]))
        checksum = writer.finish()
    Manifest(
        format=1, split="train", samples=SAMPLES, classes=CLASSES, class_counts=(4, 4, 4),
        bytes=path.stat().st_size, content_checksum="sha256:" + 64 * "0", tables_checksum=checksum,
        settings={}, source={}, skipped=(), versions={}, created="2026-01-01T00:00:00+00:00",
    ).save(manifest_path(path))  # fmt: skip


class Parts:
    """Header and tables of a .beton as arrays to change, and its bytes."""

    def __init__(self, data: bytes, manifest: dict[str, Any]) -> None:
        self.manifest = json.loads(json.dumps(manifest))
        self.header = np.frombuffer(data, HEADER, 1).copy()
        self.front = HEADER.itemsize + DESCRIPTORS.nbytes
        samples, table = int(self.header["num_samples"][0]), int(self.header["alloc_table_ptr"][0])
        self.metadata = np.frombuffer(data, METADATA, samples, self.front).copy()
        self.allocations = np.frombuffer(data, ALLOCATION, samples, table).copy()
        self.descriptors = bytearray(data[HEADER.itemsize : self.front])
        self.data = bytearray(data[self.front + self.metadata.nbytes : table])

    @classmethod
    def of(cls, path: Path) -> "Parts":
        """Those of a sound file and its manifest."""
        return cls(path.read_bytes(), json.loads(manifest_path(path).read_text()))

    def image(self, sample: int, **fields: int) -> Self:
        """Change mode, width, height or data_ptr of a sample."""
        for name, value in fields.items():
            self.metadata["f0"][name][sample] = value
        return self

    def label(self, sample: int, value: int) -> None:
        """Change a label."""
        self.metadata["f1"][sample] = value

    def place(self, sample: int, pointer: int | None = None, size: int | None = None) -> Self:
        """Change pointer or size in both tables."""
        if pointer is not None:
            self.metadata["f0"]["data_ptr"][sample] = pointer
            self.allocations["ptr"][sample] = pointer
        if size is not None:
            self.allocations["size"][sample] = size
        return self

    def save(self, path: Path) -> None:
        """Write both files so that they fit each other."""
        parts = [self.header.tobytes(), bytes(self.descriptors), self.metadata.tobytes()]
        content = b"".join([*parts, bytes(self.data), self.allocations.tobytes()])
        path.write_bytes(content)
        labels = self.metadata["f1"].tolist()
        classes = len(self.manifest["classes"])
        said = self.manifest
        said["bytes"], said["samples"] = len(content), len(labels)
        said["tables_checksum"] = _checksum(
            self.header[0], bytes(self.descriptors), self.metadata, self.allocations
        )
        counts = [labels.count(label) for label in range(classes)]
        counts[0] += len(labels) - sum(counts)  # labels out of range, hidden in the counts
        said["class_counts"] = counts
        manifest_path(path).write_text(json.dumps(said))


def mutate(parts: Parts, rng: np.random.Generator) -> None:
    """One to three random changes of entries, mostly to values at some border."""
    for _ in range(int(rng.integers(1, 4))):
        sample = int(rng.integers(len(parts.metadata)))
        other = int(rng.integers(len(parts.metadata)))
        end = int(parts.header["alloc_table_ptr"][0])
        kind = int(rng.integers(9))
        if kind == 0:
            parts.image(sample, **_some(rng, mode=256, width=65536, height=65536))
        elif kind == 1:
            parts.place(sample, pointer=_near(rng, [*HUGE, parts.front, end]))
        elif kind == 2:
            parts.place(sample, size=_near(rng, [*HUGE, end]))
        elif kind == 3:
            parts.label(sample, int(np.int64(np.uint64(_near(rng, [*HUGE, 10])))))
        elif kind == 4:  # two that lie at one place, or have changed places
            parts.place(sample, pointer=int(parts.allocations["ptr"][other]))
            if rng.random() < 0.5:
                parts.place(sample, size=int(parts.allocations["size"][other]))
        elif kind == 5:
            parts.metadata["f0"]["data_ptr"][sample] = _near(
                rng, [*HUGE, end]
            )  # in one table alone
        elif kind == 6:
            _flip(rng, parts.metadata)
        elif kind == 7:
            _flip(rng, [parts.allocations, parts.header][int(rng.random() < 0.3)])
        else:  # raw pixels that fit their bytes, or nearly
            size = int(parts.allocations["size"][sample])
            height = int(rng.integers(1, 40))
            parts.image(
                sample, mode=1, height=height, width=min(65535, max(1, size // 3 // height))
            )
            parts.place(sample, size=size // 3 // height * height * 3)


def _near(rng: np.random.Generator, places: list[int]) -> int:
    return (int(rng.choice(np.array(places, np.uint64))) + int(rng.integers(-9, 10))) % (1 << 64)


def _some(rng: np.random.Generator, **limits: int) -> dict[str, int]:
    chosen = {
        name: int(rng.integers(limit)) for name, limit in limits.items() if rng.random() < 0.6
    }
    if rng.random() < 0.3:
        chosen |= {"width": 65535, "height": 65535}
    if rng.random() < 0.5:
        chosen["mode"] = int(rng.integers(2))
    return chosen


def _flip(rng: np.random.Generator, table: NDArray[Any]) -> None:
    flat = table.view(np.uint8).reshape(-1)
    flat[int(rng.integers(len(flat)))] ^= np.uint8(1 << int(rng.integers(8)))

"""The seeded decoder against plain Python, OpenCV and the generator's published vectors."""

import math

import numpy as np
import pytest
from numba.core import caching

from ffcv_imnet.data import decoders as d
from ffcv_imnet.data.jit import jit

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]
) -> None:
    assert d.philox(np.uint64(key[0] | key[1] << 32), *counter) == result


def test_where_no_code_can_be_kept_it_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only tree and a user without a home: numba has nowhere to keep it, and refuses to compile."""

    def double(number: int) -> int:
        return 2 * number

    assert type(jit()(double)._cache).__name__ == "FunctionCache"
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert jit()(double)(21) == 42


def plain_philox(key: int, *counter: int) -> tuple[int, ...]:
    """The paper's definition in Python's own integers."""
    k0, k1, mask = key & 0xFFFFFFFF, key >> 32, 0xFFFFFFFF
    a, b, c, e = counter
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, e = (q >> 32) ^ b ^ k0, q & mask, (p >> 32) ^ e ^ k1, p & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return a, b, c, e


def plain_crop(
    height: int,
    width: int,
    seed: int,
    epoch: int,
    sample: int,
    scale: list[float],
    ratio: list[float],
) -> tuple[int, int, int, int]:
    for attempt in range(1, 11):
        words = plain_philox(seed, sample, epoch, attempt, 0)
        u = [word / 2**32 for word in words]
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u[1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    raise AssertionError("no box fits; choose another case")


def test_random_crop_against_plain_python() -> None:
    scale, ratio = [0.25, 0.6], [0.75, 4 / 3]
    for sample in range(200):
        args = (333, 500, 7 + (5 << 32), 3, sample)
        expected = plain_crop(*args, scale, ratio)
        assert d.random_crop(*args, np.array(scale), np.array(ratio)) == expected


def test_crops_lie_inside_and_cover_the_range() -> None:
    scale, ratio = np.array([0.08, 1.0]), np.array([0.75, 4 / 3])
    areas, flips = [], 0
    for sample in range(4000):
        top, left, h, w = d.random_crop(300, 400, 0, 0, sample, scale, ratio)
        assert top >= 0 and left >= 0 and h > 0 and w > 0
        assert top + h <= 300 and left + w <= 400
        areas.append(h * w / 120_000)
        flips += d.mirrored(1, 0, 0, sample)
    assert min(areas) < 0.1 and max(areas) > 0.9
    assert abs(flips / 4000 - 0.5) < 0.03  # four standard deviations


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1), (2, 3)])
def test_odd_images_still_give_a_box(size: tuple[int, int]) -> None:
    for sample in range(50):
        box = d.random_crop(*size, 0, 0, sample, np.array([0.08, 1.0]), np.array([0.75, 4 / 3]))
        for top, left, h, w in (box, d.central_crop(*size, 0.875)):
            assert h >= 1 and w >= 1 and top + h <= size[0] and left + w <= size[1]


def test_another_epoch_seed_or_sample_is_another_crop() -> None:
    scale, ratio = np.array([0.08, 1.0]), np.array([0.75, 4 / 3])
    boxes = {
        d.random_crop(3000, 4000, seed, epoch, sample, scale, ratio)
        for seed in (0, 1, 1 << 40)
        for epoch in (0, 1)
        for sample in (0, 1)
    }
    assert len(boxes) == 12


def test_central_crop_of_the_public_recipe() -> None:
    assert d.central_crop(300, 400, 224 / 256) == (19, 69, 262, 262)


def test_mirror() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    flipped = image.copy()
    d.mirror(flipped)
    assert np.array_equal(flipped, image[:, ::-1])

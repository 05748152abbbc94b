"""The C kernel against OpenCV and PIL: every scale, odd sources, crops at the borders, damage."""

import io
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ffcv_imnet.data.decoders import DAMAGES, JPEG, fault_of_stored
from ffcv_imnet.native import build
from tests.pictures import of_many_scans

library = build.load()
pytestmark = pytest.mark.skipif(library is None, reason="the crop decoder is not compiled")
Box = tuple[int, int, int, int]  # top, left, height, width


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, sharp edges and some noise, as a camera gives them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / a + y / b + c) for a, b, c in rng.uniform(5, 60, (6, 3))]
    colours = np.stack([waves[0] + waves[1], waves[2] - waves[3], waves[4] + waves[5]], -1)
    edges = np.sign(np.sin(x / 17 - y / 29))[..., None] * rng.uniform(10, 40, 3)
    noise = rng.normal(0, 3, (height, width, 3))
    return np.clip(128 + 35 * colours + edges + noise, 0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def opened(stored: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))


def resized(picture: np.ndarray, box: Box, side: int) -> np.ndarray:
    """OpenCV's answer in floats: the area of what shrinks, linear interpolation of what grows."""
    top, left, h, w = box
    crop = picture[top : top + h, left : left + w].astype(np.float32)
    across = cv2.INTER_AREA if w >= side else cv2.INTER_LINEAR
    down = cv2.INTER_AREA if h >= side else cv2.INTER_LINEAR
    narrow = cv2.resize(crop, (side, h), interpolation=across)
    return cv2.resize(narrow, (side, side), interpolation=down)


def pil_resized(picture: np.ndarray, box: Box, side: int, filter: Image.Resampling) -> np.ndarray:
    top, left, h, w = box
    crop = Image.fromarray(picture[top : top + h, left : left + w])
    return np.asarray(crop.resize((side, side), filter)).astype(int)


def kernel(
    stored: bytes, size: tuple[int, int], box: Box, side: int, mode: int = JPEG, flip: bool = False
) -> tuple[int, np.ndarray]:
    """Status and pixels, as int."""
    assert library is not None
    data, out = np.frombuffer(stored, np.uint8), np.full((side, side, 3), 99, np.uint8)
    status = library.ffcv_imnet_crop_resize(
        *(data.ctypes.data, len(data), 0, len(data), mode == JPEG),
        *(*size, *box, out.ctypes.data, side, side, flip),
    )
    return status, out.astype(int)


def boxes(height: int, width: int, seed: int) -> list[Box]:
    """The whole, the corners, and some in between."""
    rng = np.random.default_rng(seed)
    h, w = max(1, height // 2), max(1, width // 3)
    found = [(0, 0, height, width), (0, 0, h, w), (height - h, width - w, h, w)]
    for _ in range(5):
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        found.append(
            (int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
        )
    return found


KINDS: dict[str, dict[str, object]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "restarts": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_decoded_as_the_whole(kind: str) -> None:
    """Where nothing is resized the pixels are PIL's, exactly: also beside the crop's borders."""
    stored = jpeg(image(131, 197), **KINDS[kind])  # type: ignore[arg-type]
    whole = opened(stored).astype(int)
    for side in (1, 5, 16, 33, 131):
        for top in (0, 1, 15, 16, 17, 131 - side):
            for left in (0, 15, 16, 31, 197 - side):
                if top + side <= 131:
                    status, ours = kernel(stored, (131, 197), (top, left, side, side), side)
                    assert status == 0
                    expected = whole[top : top + side, left : left + side]
                    assert np.array_equal(ours, expected), (side, top, left)


@pytest.mark.parametrize("shrunk", [1, 2, 4, 8])
def test_resizing_at_every_scale(shrunk: int) -> None:
    """Near the area of the whole image's pixels, and no further from PIL's filter than that is."""
    off, ours_off_pil, area_off_pil = [], [], []
    for seed in range(4):
        stored = jpeg(image(400, 300, seed))
        whole = opened(stored)
        for box in [(3, 5, 389, 290), (0, 0, 300, 300), (101, 37, 299, 263)]:
            side = int(min(box[2:]) / shrunk / 1.3)
            status, ours = kernel(stored, whole.shape[:2], box, side)
            assert status == 0
            area = resized(whole, box, side)
            bilinear = pil_resized(whole, box, side, Image.Resampling.BILINEAR)
            off.append(np.abs(ours - area).mean())
            ours_off_pil.append(np.abs(ours - bilinear).mean())
            area_off_pil.append(np.abs(area - bilinear).mean())
    assert np.max(off) < {1: 0.3, 2: 0.8, 4: 1.2, 8: 2.5}[shrunk]  # levels of 255
    assert np.mean(ours_off_pil) < 1.05 * np.mean(area_off_pil)


SIZES = [(1, 1), (1, 400), (400, 1), (2, 3), (17, 2000), (3000, 5), (100, 140), (333, 500)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [8, 37, 128])
def test_raw_pixels_are_opencvs(size: tuple[int, int], side: int) -> None:
    """From one pixel to a panorama, shrunk and enlarged: never off by more than rounding.

    Where hundreds of rows make one, cutting each product to 16 bits adds up to a second level.
    """
    picture = image(*size)
    bound = 2 if max(size) > 60 * side else 1
    for box in boxes(*size, seed=side):
        status, ours = kernel(picture.tobytes(), size, box, side, mode=1)
        assert status == 0
        assert np.abs(ours - resized(picture, box, side)).max() <= bound, box
        _, flipped = kernel(picture.tobytes(), size, box, side, mode=1, flip=True)
        assert np.array_equal(flipped, ours[:, ::-1])


@pytest.mark.parametrize("size", SIZES)
def test_odd_jpegs_decode(size: tuple[int, int]) -> None:
    stored = jpeg(image(*size))
    for box in boxes(*size, seed=3):
        status, ours = kernel(stored, size, box, 32)
        assert status == 0
        # Shrunk by at most 8 in the decoder, so the means agree whatever the filter does.
        assert abs(ours.mean() - resized(opened(stored), box, 32).mean()) < 4


def test_white_stays_white_and_black_black() -> None:
    for level in (0, 255):
        picture = np.full((300, 900, 3), level, np.uint8)
        for side in (16, 100, 299, 400):
            for mode, stored in ((JPEG, jpeg(picture)), (1, picture.tobytes())):
                _, ours = kernel(stored, (300, 900), (0, 1, 300, 899), side, mode)
                assert (ours == level).all()


def test_whole_numbers_of_pixels_agree_with_pil() -> None:
    """Where 2, 3 or 5 pixels make one, PIL's BOX is the same area."""
    picture = image(320, 500)
    for by in (2, 3, 5):
        box, side = (7, 11, 60 * by, 60 * by), 60
        _, ours = kernel(picture.tobytes(), (320, 500), box, side, mode=1)
        assert np.abs(ours - pil_resized(picture, box, side, Image.Resampling.BOX)).max() <= 1


def test_validation_crops_agree_with_pil() -> None:
    """The README's number: central crops of 400 px images to 256 and 224 px."""
    for seed in range(3):
        stored = jpeg(image(300, 400, seed))
        for side in (224, 256):
            box = (19, 69, 262, 262)
            _, ours = kernel(stored, (300, 400), box, side)
            assert np.abs(ours - resized(opened(stored), box, side)).max() <= 1
            bilinear = pil_resized(opened(stored), box, side, Image.Resampling.BILINEAR)
            assert np.abs(ours - bilinear).mean() < 0.3


def test_damage_is_noticed_and_leaves_no_pixels() -> None:
    stored = jpeg(image(200, 300))
    everything = (0, 0, 200, 300)
    middle = len(stored) // 2
    cases = {
        "truncated": stored[:middle],
        "no header": bytes(100) + stored[100:],
        "a hole": stored[:middle] + bytes(400) + stored[middle + 400 :],
        "empty": stored[:2],
        "a marker inside": stored[:middle] + b"\xff\xd9" + stored[middle + 2 :],
    }
    for name, damaged in cases.items():
        status, pixels = kernel(damaged, (200, 300), everything, 64)
        assert DAMAGES[status] == "is damaged" and not pixels.any(), name
    status, _ = kernel(stored, (300, 200), (0, 0, 200, 200), 64)
    assert "another size" in DAMAGES[status]
    status, _ = kernel(jpeg(image(64, 64), mode="CMYK"), (64, 64), (0, 0, 64, 64), 16)
    assert "neither grey nor RGB" in DAMAGES[status]
    status, _ = kernel(bytes(10), (64, 64), (0, 0, 64, 64), 16, mode=1)
    assert "outside the file" in DAMAGES[status]
    # The decoder is as good as new afterwards.
    assert kernel(stored, (200, 300), everything, 64)[0] == 0


def test_nothing_outside_the_mapping_is_touched() -> None:
    """Whatever start, size, image and crop are said to be: a status, and no pixels."""
    stored = jpeg(image(40, 60))
    out = np.empty((16, 16, 3), np.uint8)

    def status(start: int, size: int, is_jpeg: bool, *picture: int) -> str:
        assert library is not None
        data = np.frombuffer(stored, np.uint8)
        out[:] = 99
        number = library.ffcv_imnet_crop_resize(
            *(data.ctypes.data, len(data), start, size, is_jpeg, *picture),
            *(out.ctypes.data, 16, 16, False),
        )
        assert number == 0 or not out.any()
        return DAMAGES[number]

    size, whole = len(stored), (40, 60, 0, 0, 40, 60)
    assert status(0, size, True, *whole) == ""
    for start, length in (
        (0, size + 1),
        (1, size),
        (size, 1),
        (-1, 2),
        (0, 0),
        (0, -1),
        (1 << 62, 1 << 62),
    ):
        assert "outside the file" in status(start, length, True, *whole), (start, length)
    for picture in (
        (65535, 65535, 0, 0, 65535, 65535),
        (40, 60, 0, 0, 41, 60),
        (40, 60, 1, 0, 40, 60),
        (40, 60, -1, 0, 40, 60),
        (0, 60, 0, 0, 1, 1),
        (40, 65536, 0, 0, 1, 1),
    ):
        assert "outside the file" in status(0, size, False, *picture), picture


@pytest.mark.parametrize("whole", [False, True])
def test_a_progressive_jpeg_has_bounds(whole: bool) -> None:
    stored = jpeg(image(64, 64), progressive=True)
    many, most = of_many_scans(883), of_many_scans(100)
    # As large as a table may say, in coefficients that would take gigabytes: the header alone.
    at = stored.index(b"\xff\xc2") + 5
    huge = stored[:at] + b"\xff\xdc\xff\xdc" + stored[at + 4 :]
    if whole:
        assert fault_of_stored(np.frombuffer(stored, np.uint8), True, 64, 64) == 0
        assert fault_of_stored(np.frombuffer(most, np.uint8), True, 8, 8) == 0
        fault = fault_of_stored(np.frombuffer(many, np.uint8), True, 8, 8)
        assert "too many scans" in DAMAGES[fault]
        fault = fault_of_stored(np.frombuffer(huge, np.uint8), True, 65500, 65500)
        assert "too much memory" in DAMAGES[fault]
        return
    everything = (0, 0, 64, 64)
    assert kernel(stored, (64, 64), everything, 32)[0] == 0
    assert kernel(most, (8, 8), (0, 0, 8, 8), 8)[0] == 0
    assert "too many scans" in DAMAGES[kernel(many, (8, 8), (0, 0, 8, 8), 8)[0]]
    started = time.monotonic()
    assert "too much memory" in DAMAGES[kernel(huge, (65500, 65500), (0, 0, 65500, 65500), 32)[0]]
    assert time.monotonic() - started < 2


def test_jpegs_of_other_kinds_are_damaged() -> None:
    """12 bits and lossless: by the header's marker and precision."""
    stored = bytearray(jpeg(image(64, 64)))
    at = stored.index(b"\xff\xc0")
    for marker, precision in ((0xC0, 12), (0xC1, 12), (0xC3, 8), (0xC5, 8)):
        stored[at + 1], stored[at + 4] = marker, precision
        status, _ = kernel(bytes(stored), (64, 64), (0, 0, 64, 64), 16)
        assert DAMAGES[status] == "is damaged", (marker, precision)


@pytest.mark.parametrize("size", [(1, 65535), (65535, 1), (2, 65500), (65500, 2)])
def test_strips_of_the_longest_side(size: tuple[int, int]) -> None:
    """Four thousand pixels make one: what cutting each product loses adds up to eight levels."""
    picture = np.resize(np.arange(256, dtype=np.uint8), (*size, 3))
    modes = [(1, picture.tobytes())] + ([(JPEG, jpeg(picture))] if max(size) <= 65500 else [])
    for mode, stored in modes:
        status, ours = kernel(stored, size, (0, 0, *size), 16, mode)
        assert status == 0 and abs(ours.mean() - picture.mean()) < 9


def test_a_library_of_another_source_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library_path()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert build.library_path() != before and build.load() is None


def test_a_library_beside_a_source_that_is_not_ours_to_change_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed for all users: compiled at the first use, into the user's cache."""
    monkeypatch.setattr(build, "FOLDER", tmp_path / "not writable, as it does not exist")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = build.build()
    assert built.parent == tmp_path / "cache" / "ffcv_imnet" and build.load() is not None
    changed = built.stat().st_mtime_ns
    assert build.build() == built and built.stat().st_mtime_ns == changed

"""Sources and pixels: against torchvision's ImageFolder and Pillow."""

import importlib.util
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.images import pixels
from ffcv_imnet.images.encode import PixelSettings, as_jpeg, encode_image
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.pixels import (
    BadImage,
    decode_rgb,
    encode_jpeg,
    scans_of,
    shrink,
    target_size,
)
from ffcv_imnet.images.remarks import check_oddities
from ffcv_imnet.images.sources import open_source
from ffcv_imnet.images.stored import Stored
from tests.pictures import make_tree, of_many_scans, picture, save


def file_of(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def reference(data: bytes) -> NDArray[np.uint8]:
    """What is right by definition, by Pillow; what is transparent on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes with transparency
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB"))
        image = image.convert("RGBA")
        paper = Image.new("RGB", image.size, (255, 255, 255))
        paper.paste(image, mask=image.getchannel("A"))
        return np.asarray(paper)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(Image.fromarray(picture(3)), "JPEG", exif=exif.tobytes())


def transparent() -> Image.Image:
    image = Image.fromarray(picture(4)).convert("RGBA")
    image.putalpha(Image.fromarray(picture(5)[:, :, 0]))
    return image


RGB = Image.fromarray(picture(1))
KINDS = {
    "rgb": file_of(RGB, "JPEG"),
    "grayscale": file_of(RGB.convert("L"), "JPEG"),
    "cmyk": file_of(RGB.convert("CMYK"), "JPEG"),
    "palette": file_of(RGB.convert("P"), "PNG"),
    "palette with transparency": file_of(RGB.convert("P"), "PNG", transparency=b"\x00\x80"),
    "rgba": file_of(transparent(), "PNG"),
    "gray with alpha": file_of(transparent().convert("LA"), "PNG"),
    "one bit": file_of(RGB.convert("1"), "PNG"),
    "png": file_of(RGB, "PNG"),
    "bmp": file_of(RGB, "BMP"),
    "ppm": file_of(RGB, "PPM"),
    "tiff": file_of(RGB, "TIFF"),
    "webp": file_of(RGB, "WEBP"),
    **{f"orientation {value}": rotated(value) for value in range(1, 9)},
    "orientation 9": rotated(9),
}


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_as_pillow_does(kind: str) -> None:
    pixels = decode_rgb(KINDS[kind])
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    assert np.abs(pixels.astype(int) - reference(KINDS[kind])).max() <= 1  # two ways of rounding


@pytest.mark.parametrize("kind", KINDS)
def test_stored_within_the_bound_of_jpeg(kind: str, tmp_path: Path) -> None:
    # All of them under a name ending in .JPEG: the content counts, not the name.
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.JPEG").write_bytes(KINDS[kind])
    tree = ImageFolderTree(tmp_path)
    raw = encode_image(tree, 0, 0, PixelSettings(compress_probability=0), 1 << 23)
    jpeg = encode_image(tree, 0, 0, PixelSettings(), 1 << 23)
    assert isinstance(raw, Stored) and isinstance(jpeg, Stored)
    right = decode_rgb(KINDS[kind])
    assert (raw.height, raw.width) == (jpeg.height, jpeg.width) == right.shape[:2]
    assert raw.data == right.tobytes()
    # Mean absolute error: smooth images lose 2.5 of 256 levels at most; dithered ones (palette,
    # one bit) are all edges, whose colour JPEG halves.
    error = np.abs(decode_rgb(jpeg.data).astype(int) - right).mean()
    dithered = kind.startswith(("palette", "one bit"))
    assert error < (16 if dithered else 2.5)


@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_is_scaled_first(orientation: int) -> None:
    wide = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    right = np.rint(wide / 257).astype(np.uint8)
    right = np.rot90(right, -1) if orientation == 6 else right
    for kind in ("PNG", "PPM", "TIFF"):
        how = {"exif": exif} if kind == "PNG" else {}
        if orientation != 1 and not how:
            continue
        pixels = decode_rgb(file_of(Image.fromarray(wide), kind, **how))
        assert np.array_equal(pixels, np.repeat(right[:, :, None], 3, axis=2)), kind


def test_floating_point_is_scaled_by_the_range_that_holds_it() -> None:
    for white in (1, 255, 65535):
        tiff = file_of(Image.fromarray(np.full((9, 9), 0.2 * white, np.float32)), "TIFF")
        assert np.unique(decode_rgb(tiff)) == 51
    for odd in (-1.0, 70000.0, np.nan):
        with pytest.raises(BadImage, match=r"values from .* scale them"):
            decode_rgb(file_of(Image.fromarray(np.full((9, 9), odd, np.float32)), "TIFF"))


def test_what_is_transparent_is_white() -> None:
    black = Image.new("RGBA", (8, 8))
    black.putpixel((3, 3), (0, 0, 0, 255))
    colours = black.convert("RGB").convert("P")
    colours.putpixel((3, 3), 1)
    for image, how in ((black, {}), (black.convert("LA"), {}), (colours, {"transparency": 0})):
        pixels = decode_rgb(file_of(image, "PNG", **how))
        assert (pixels[0, 0] == 255).all() and (pixels[3, 3] < 255).any(), image.mode
    half = Image.new("RGBA", (8, 8), (200, 100, 0, 51))
    assert np.abs(decode_rgb(file_of(half, "PNG"))[0, 0] - np.array([244, 224, 204])).max() <= 1


def test_avif_is_read_and_heic_says_what_reads_it() -> None:
    assert np.abs(decode_rgb(file_of(RGB, "AVIF", quality=90)).astype(int) - picture(1)).mean() < 6
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    found = importlib.util.find_spec("pillow_heif")
    with pytest.raises(BadImage, match="" if found else "HEIC image: `pip install pillow-heif`"):
        decode_rgb(heic)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_damaged_exif_does_not_lose_the_image(block: bytes) -> None:
    pixels = decode_rgb(file_of(RGB, "JPEG", exif=block))
    assert np.array_equal(pixels, decode_rgb(KINDS["rgb"]))


def test_orientation_counts_even_if_the_rest_of_exif_is_damaged() -> None:
    # Tag 0x0112 in order, then one whose value lies beyond the block.
    entries = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00" + (
        b"\x0e\x01\x02\x00\xff\x00\x00\x00\xff\xff\x00\x00"
    )
    block = b"Exif\0\0II*\0\x08\0\0\0\x02\x00" + entries + b"\0\0\0\0"
    pixels = decode_rgb(file_of(RGB, "JPEG", exif=block))
    assert np.array_equal(pixels, np.rot90(decode_rgb(KINDS["rgb"]), -1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (KINDS["rgb"][: len(KINDS["rgb"]) // 2], "truncated"),
        (KINDS["png"][: len(KINDS["png"]) // 2], "truncated"),
        (b"<html>404</html>", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_undecodable_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"(?i){reason}"):
        decode_rgb(data)


def tiff_of(compression: int, samples: int) -> bytes:
    """8 x 8 px whose compressed bytes are no such ones."""
    tags = {
        256: 8,
        257: 8,
        258: 8,
        259: compression,
        262: 1,
        273: 200,
        277: samples,
        278: 8,
        279: 64,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries
    return head.ljust(200, b"\0") + b"\x80\xff" * 300


@pytest.mark.parametrize("compression", [2, 4, 5, 7, 8, 32773, 34925, 50000])
def test_a_damaged_tiff_is_refused_without_lines_of_libtiff(
    compression: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadImage, match=r"its compressed pixels are damaged \(decoder error"):
        decode_rgb(tiff_of(compression, 1))
    with pytest.raises(BadImage, match="not read, or damaged"):
        decode_rgb(tiff_of(compression, 200))
    assert capfd.readouterr() == ("", "")


def made_tiff(bits: int, channels: int = 1, **tags: int) -> bytes:
    """A TIFF of 4 x 4 pixels, all zero, in one strip. Tags: t262 and so on."""
    names = {
        256: 4,
        257: 4,
        258: bits,
        259: 1,
        262: 2 if channels > 2 else 1,
        273: 8,
        277: channels,
        278: 4,
    }
    names |= {279: 16 * bits // 8 * channels} | {int(key[1:]): value for key, value in tags.items()}
    pixels = bytes(names[279])
    each = struct.pack(f"<{channels}H", *[bits] * channels)  # of tag 258, behind the pixels
    entries = b"".join(
        struct.pack("<HHII", 258, 3, channels, 8 + len(pixels) if channels > 2 else value)
        if tag == 258
        else struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 2 if tag == 338 else 1, value)
        for tag, value in sorted(names.items())
    )
    head = struct.pack("<2sHI", b"II", 42, 8 + len(pixels) + len(each))
    return head + pixels + each + struct.pack("<H", len(names)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (made_tiff(16, t262=0), "in which zero is white"),
        (made_tiff(8, t339=2), "signed samples"),
        (made_tiff(8, 5, t338=0), "5 channels, of which three"),
        (made_tiff(16, 3, t284=2), "channel after channel"),
    ],
)
def test_a_tiff_that_would_be_read_as_other_pixels_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode_rgb(data)


def test_a_tiff_of_pages_is_refused_and_one_with_a_preview_is_not() -> None:
    page, small = Image.new("L", (32, 24), 7), Image.new("L", (8, 6), 9)
    with pytest.raises(BadImage, match="several pages"):
        decode_rgb(file_of(page, "TIFF", save_all=True, append_images=[page]))
    assert (decode_rgb(file_of(page, "TIFF", save_all=True, append_images=[small])) == 7).all()
    assert (decode_rgb(made_tiff(8, t262=0)) == 255).all()


def test_16_bit_images_of_a_12_bit_camera_are_odd(tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), 4000 + number, np.uint16)).save(folder / f"{number}.png")
    source = open_source("train", [tmp_path])
    with pytest.raises(UsageError, match="without a value above 4,002 of 65,535"):
        check_oddities(source)
    Image.fromarray(np.full((9, 9), 5000, np.uint16)).save(tmp_path / "train/b/4.png")
    check_oddities(open_source("train", [tmp_path]))


def area_mean(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.float64]:
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    return pixels.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


def test_shrinking_averages_areas() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8)
    small = shrink(pixels, 48, None)
    assert np.abs(small - area_mean(pixels, 3)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("given", "longest", "shorter", "wanted"),
    [
        ((375, 500), 400, None, (300, 400)),
        ((1333, 1000), 400, None, (400, 300)),
        ((300, 200), 400, None, (300, 200)),  # never enlarged
        ((375, 500), None, 256, (256, 341)),
        ((200, 1000), None, 256, (200, 1000)),
        ((1, 5000), 400, None, (1, 400)),  # no side vanishes
        ((375, 500), None, None, (375, 500)),
    ],
)
def test_target_size(
    given: tuple[int, int], longest: int | None, shorter: int | None, wanted: tuple[int, int]
) -> None:
    assert target_size(*given, longest, shorter) == wanted
    assert shrink(np.zeros((*given, 3), np.uint8), longest, shorter).shape == (*wanted, 3)


def test_jpeg_quality_counts() -> None:
    pixels = picture(2)
    assert len(encode_jpeg(pixels, 30)) < len(encode_jpeg(pixels, 95))


def test_choice_of_jpeg_is_seeded() -> None:
    first = [as_jpeg(0, index, 0.25) for index in range(4000)]
    assert first == [as_jpeg(0, index, 0.25) for index in range(4000)]
    assert first != [as_jpeg(1, index, 0.25) for index in range(4000)]
    assert abs(np.mean(first) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert all(as_jpeg(0, index, 1.0) for index in range(1000))
    assert not any(as_jpeg(0, index, 0.0) for index in range(1000))


def test_image_larger_than_a_page_is_bad(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.png", picture(0, 100, 100))
    bad = encode_image(
        ImageFolderTree(tmp_path), 0, 0, PixelSettings(compress_probability=0), 20_000
    )
    assert not isinstance(bad, Stored) and "more than a page" in bad.reason


def test_workers_import_neither_torch_nor_ffcv() -> None:
    code = (
        "import sys, ffcv_imnet.images.encode, ffcv_imnet.images.folder, write_ffcv\n"
        "sys.exit(', '.join({'torch', 'ffcv', 'numba'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# --------------------------------------------------------------------------- ImageFolder trees


def test_same_order_and_labels_as_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = make_tree(tmp_path) / "train"
    save(root / "n00000001" / "b" / "deep.PNG", picture(1))
    save(root / "n00000001" / "b-b" / "deep.jpeg", picture(1))
    save(root / "n00000001" / "Zebra.webp", picture(1))
    (root / "n00000001" / "notes.txt").write_text("not an image")
    (root / "list.jpg").write_text("beside the classes")
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "linked.bmp", picture(2))
    (root / "z").symlink_to(tmp_path / "elsewhere")
    tree, theirs = ImageFolderTree(root), ImageFolder(root)
    assert list(tree.classes) == theirs.classes
    assert [str(root / tree.name(i)) for i in range(len(tree))] == [p for p, _ in theirs.samples]
    assert tree.labels.tolist() == theirs.targets
    assert tree.ignored == 1
    data, label = tree.read(len(tree) - 1)
    assert data == (root / "z" / "linked.bmp").read_bytes() and label == theirs.targets[-1]


def test_subset_is_small_and_reads_the_same(tmp_path: Path) -> None:
    tree = ImageFolderTree(make_tree(tmp_path) / "train")
    part = pickle.loads(pickle.dumps(tree.subset([7, 2])))
    assert [part.name(0), part.name(1)] == [tree.name(7), tree.name(2)]
    assert part.read(0) == tree.read(7) and part.classes == tree.classes
    assert len(pickle.dumps(part)) < 1500


def test_fingerprint_notices_changes(tmp_path: Path) -> None:
    root = make_tree(tmp_path) / "train"
    before = ImageFolderTree(root).fingerprint()
    assert ImageFolderTree(root).fingerprint() == before
    image = root / ImageFolderTree(root).name(0)
    os.utime(image, (1, 1))
    touched = ImageFolderTree(root).fingerprint()
    image.unlink()
    assert len({before, touched, ImageFolderTree(root).fingerprint()}) == 3


def test_pipe_is_unreadable_not_a_hang(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "x.jpg")
    bad = encode_image(ImageFolderTree(tmp_path), 0, 0, PixelSettings(), 1 << 23)
    assert not isinstance(bad, Stored) and "it is a pipe" in bad.reason


def test_a_file_of_terabytes_is_not_read(tmp_path: Path) -> None:
    make_tree(tmp_path)
    source = ImageFolderTree(tmp_path / "train")
    with Path(source.where, source.name(0)).open("r+b") as file:
        file.truncate(1 << 40)  # a hole, which takes no place on the disk
    with pytest.raises(OSError, match="it has more than 2 GB"):
        source.read(0)


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    make_tree(tmp_path, split="Train")
    with pytest.raises(
        UsageError, match=r"no folder 'train'.*holds Train \(rename Train to train\)"
    ):
        ImageFolderTree(tmp_path / "train")
    (tmp_path / "Validation").mkdir()
    with pytest.raises(UsageError, match=r"\(rename Validation to val\)"):
        ImageFolderTree(tmp_path / "val")
    with pytest.raises(UsageError, match=r"nowhere does not exist: expected"):
        ImageFolderTree(tmp_path / "nowhere" / "train")
    (tmp_path / "Train" / "empty").mkdir()
    with pytest.raises(UsageError, match="hold no image: empty"):
        ImageFolderTree(tmp_path / "Train")
    flat = tmp_path / "Train" / "n00000000"
    with pytest.raises(UsageError, match="no class folders but 5 images side by side"):
        ImageFolderTree(flat)
    (tmp_path / "none" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="no images in any of the 1 class folders"):
        ImageFolderTree(tmp_path / "none")


# ------------------------------------------------------------------- images that are made to hurt


def test_a_large_image_is_named_with_the_limit_that_an_option_raises(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/map.png").write_bytes(file_of(Image.new("1", (300, 200)), "PNG"))
    tree = ImageFolderTree(tmp_path)
    bad = encode_image(tree, 0, 0, PixelSettings(max_pixels=59_998), 1 << 23)
    assert not isinstance(bad, Stored)
    assert bad.reason.startswith("60,000 pixels, more than 59,998: a decompression bomb, or")
    assert "--max_pixels" in bad.reason
    assert isinstance(encode_image(tree, 0, 0, PixelSettings(max_pixels=60_000), 1 << 23), Stored)
    huge = b"P6 65535 65535 255\n" + bytes(100)  # 12 GB
    with pytest.raises(BadImage, match="4,294,836,225 pixels, more than 178,956,970") as refused:
        decode_rgb(huge)
    assert "--max_pixels" not in str(
        refused.value
    )  # of predict and others, which have no such option


def test_a_jpeg_of_a_thousand_scans_is_refused_at_once() -> None:
    assert decode_rgb(of_many_scans(100)).shape == (8, 8, 3)
    started = time.monotonic()
    with pytest.raises(BadImage, match="a JPEG of more than 100 scans"):
        decode_rgb(of_many_scans(883, side=4000))
    assert time.monotonic() - started < 1
    # Scans of a thumbnail and of a film behind the end are not counted.
    plain = file_of(Image.new("RGB", (8, 8)), "JPEG")
    inside = b"\xff\xe1\xff\x00" + 100 * b"\xff\xda" + bytes(0xFF00 - 202)
    assert scans_of(plain[:2] + inside + plain[2:] + 200 * b"\xff\xda\x00\x02") == 1


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (chunk(b"abCd") * 11_000, "more than 10,"),
        (chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(99))) * 9, "more than 8 colour profiles"),
        (chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 << 20))), "unpack to more than 1 MB"),
        (chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))), "unpack to more than 1 MB"),
    ],
)
def test_what_comes_with_a_png_is_bounded(extra: bytes, reason: str) -> None:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    data = file.getvalue()
    assert decode_rgb(data + bytes(10**6)).shape == (8, 8, 3)  # appended: not its chunks
    with pytest.raises(BadImage, match=reason):
        decode_rgb(data[:33] + extra + data[33:])


def test_a_ppm_whose_header_is_a_comment_is_refused_at_once() -> None:
    assert decode_rgb(b"P5 #of a camera\n2 # wide\n2 255 abcd" + bytes(5000)).shape == (2, 2, 3)
    with pytest.raises(BadImage, match="header has more than 4,096 bytes"):
        decode_rgb(b"P5 2 2 #" + b"x" * 5000 + b"\n255 abcd")


def test_scans_and_pixels_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    assert decode_rgb(file.getvalue()).shape == (64, 64, 3)
    monkeypatch.setattr(pixels, "MOST_SCANNED", 64 * 64)
    with pytest.raises(
        BadImage, match=r"a JPEG of \d scans of 4,096 pixels, together more than 4,096"
    ):
        decode_rgb(file.getvalue())


def test_kinds_of_jpeg_and_palette() -> None:
    grey = Image.fromarray(picture(3)).convert("L")
    plain = file_of(grey, "JPEG")
    at = plain.index(b"\xff\xc0")
    for marker, precision in (
        (0xC1, 12),
        (0xC3, 8),
        (0xC7, 8),
        (0xCB, 8),
    ):  # 12 bits, lossless, others
        other = bytearray(plain)
        other[at + 1], other[at + 4] = marker, precision
        with pytest.raises(BadImage, match="12 bits a sample" if precision == 12 else None):
            decode_rgb(bytes(other))
    with pytest.raises(BadImage, match="a TIFF of a kind that is not read"):
        decode_rgb(b"II*\0" + bytes(20))
    for damaged in (plain[:-200], plain[:30], plain[:2]):
        with pytest.raises(BadImage):
            decode_rgb(damaged)
    cmyk = file_of(Image.fromarray(picture(3)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_rgb(cmyk).astype(int) - picture(3)).mean() < 4
    few = Image.fromarray(picture(3)).quantize(16)  # a palette
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        assert np.array_equal(decode_rgb(file_of(few, kind)), np.asarray(few.convert("RGB")))

"""Encoded bytes to upright RGB pixels, smaller pixels, and JPEG again.

The reference for decoding is `ImageOps.exif_transpose(image).convert("RGB")` in Pillow, whatever
the file's extension says, but for two kinds that it spoils: 16-bit and floating-point grayscale, which
`convert` would clip to white or to black, is scaled first, and what is transparent is laid on white,
since the colour below it is anything, mostly the black of the subject.
"""

import ctypes
import functools
import io
import logging
import re
import warnings
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError, features

from ffcv_imnet.images import POINTER, Pixels
from ffcv_imnet.native import build

# It logs of some damaged files; what matters it raises.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Images only. Pillow would otherwise run Ghostscript on an EPS that is named .jpg.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # its values, as ImageOps.exif_transpose undoes them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What the file type box of ISO's base media format says of an image.
AVIF, HEIC = (b"avif", b"avis"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
FULL_SCALES = (1.0, 255.0, 65535.0)  # white, of floating-point grayscale
LONGEST = 65535  # ffcv stores width and height in 16 bits
MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte as RGB
# Of a JPEG: encoders make about ten, libjpeg's at most this many. Each goes over the whole image again,
# so that a thousand take minutes where the file is small: so are the pixels times the scans bounded.
MOST_SCANS, MOST_SCANNED = 100, 8_000_000_000
# Of a PNG: encoders put 4 kB and more of pixels into a chunk, animations have two chunks a frame; each
# takes Pillow as long as 10,000 pixels. Of colour profiles there is one, and Pillow unpacks each to 1 MB.
MOST_CHUNKS, CHUNK, MOST_PROFILES = 10_000, 1000, 8
PPM_HEADER = 4096  # bytes, comments included, which Pillow reads one at a time
DAMAGED = 1  # of the crop decoder's answers
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in the data, 0xff before 0 or a restart is none


class BadImage(Exception):
    """This image cannot be stored; the message is the reason in a few words."""


def decode_rgb(data: bytes, max_pixels: int | None = None) -> Pixels:
    """Decode a whole image file, unless its header promises more than `max_pixels` (None: `MAX_PIXELS`,
    where no option of that name is there to be advised).

    Returns:
        (height, width, 3) uint8, RGB, upright.

    Raises:
        BadImage: empty, truncated, of no format that we read, or otherwise undecodable.
    """
    if not data:
        raise BadImage("the file is empty")
    if fault := _slow(data):
        raise BadImage(f"{fault}, which is made to take long")
    most = MAX_PIXELS if max_pixels is None else max_pixels
    Image.MAX_IMAGE_PIXELS = (most + 1) // 2  # Pillow warns there, and refuses twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF and palettes are ordinary here
            image = open_image(data)
            if image.format == "TIFF":
                _quiet_libtiff()
                if fault := _misread(image):
                    raise BadImage(f"a TIFF of {fault}")
            pixels = image.width * image.height
            if (
                image.format in ("JPEG", "MPO")
                and pixels > MOST_SCANNED // MOST_SCANS
                and (scans := scans_of(data)) * pixels > MOST_SCANNED
            ):
                raise BadImage(
                    f"a JPEG of {scans} scans of {pixels:,} pixels, together more than {MOST_SCANNED:,}, which"
                    " is made to take long"
                )
            image.load()
            image = _on_white(_eight_bit(_upright(image)))
            # `convert` copies even where it has nothing to do: a tenth of a small JPEG's time.
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (MemoryError, BadImage):
        raise
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise BadImage(
            f"{f'{int(found[0]):,}' if found else 'too many'} pixels, more than {most:,}: a"
            " decompression bomb, or a large image "
            + ("to make smaller first" if max_pixels is None else "that --max_pixels allows")
        ) from None
    except UnidentifiedImageError:
        raise BadImage(
            _unread(data) or f"not an image ({', '.join(FORMATS)}), or its start is damaged"
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("decoder error"):
            reason = f"its compressed pixels are damaged ({reason})"
        if "MAX_TEXT" in reason:  # a name in Pillow
            reason = (
                "a PNG whose texts or colour profile unpack to more than 1 MB, or to 64 MB together"
            )
        raise BadImage(reason) from None


@functools.cache
def _quiet_libtiff() -> None:
    """No more lines of libtiff on the standard error, which name no file: Pillow raises what matters of them."""
    with suppress(OSError, AttributeError, StopIteration):  # no Linux, or no libtiff of its own
        mapped = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        library = ctypes.CDLL(next(line.split()[-1] for line in mapped if "/libtiff" in line))
        library.TIFFSetErrorHandler(None)


def _unread(data: bytes) -> str | None:
    """What a sound file is that Pillow takes for none; None if nothing is known of it."""
    if data.startswith(POINTER):
        return "only Git's pointer to the image: fetch it with `git lfs pull`"
    frame = re.search(rb"\xff[\xc0-\xc3\xc9-\xcb]..([\x02-\x10])", data[: 1 << 16], re.DOTALL)
    if data[:2] == b"\xff\xd8" and frame and frame[1] != b"\x08":
        return f"a JPEG of {frame[1][0]} bits a sample, of which only 8 are read: convert it to PNG"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF of a kind that is not read, or damaged: convert it to 8 or 16 bits a sample"
    return None


def _slow(data: bytes) -> str | None:
    """What in a file of few bytes or pixels would keep Pillow busy for minutes; None if nothing."""
    if data[:2] == b"\xff\xd8":
        return f"a JPEG of more than {MOST_SCANS} scans" if scans_of(data) > MOST_SCANS else None
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        at, chunks, profiles, most = 8, 0, 0, MOST_CHUNKS + len(data) // CHUNK
        while (kind := data[at + 4 : at + 8]) and kind != b"IEND":
            chunks, profiles = chunks + 1, profiles + (kind == b"iCCP")
            at += 12 + int.from_bytes(data[at : at + 4], "big")
            if profiles > MOST_PROFILES:
                return f"a PNG of more than {MOST_PROFILES} colour profiles"
            if chunks > most:
                return f"a PNG of more than {most:,} chunks in {len(data):,} bytes"
    elif re.match(rb"P[1-6fF]\s", data) and len(data) > PPM_HEADER:
        words = re.sub(rb"#[^\r\n]*", b" ", data[:PPM_HEADER]).split()
        if len(words) < (3 if words[0] in (b"P1", b"P4") else 4):
            return f"a PPM whose header has more than {PPM_HEADER:,} bytes"
    return None


def scans_of(data: bytes) -> int:
    """Scans of a JPEG, without those of a thumbnail; one more than `MOST_SCANS` for any more."""
    at, count = 2, 0
    while count <= MOST_SCANS and (found := MARKER.search(data, at)):
        at, marker = found.end(), data[found.end() - 1]
        if marker == 0xD9:  # end of image; phones append films
            break
        count += marker == 0xDA
        if marker not in (0x01, 0xD8):
            at += int.from_bytes(data[at : at + 2], "big")
    return count


@functools.cache
def _native() -> ctypes.CDLL | None:
    return build.load()


def is_partly_lost(data: bytes) -> bool:
    """Whether libjpeg warns of a JPEG, which Pillow reads without a word: some pixels are gray, or lie elsewhere.

    False where the crop decoder is not compiled, and for JPEGs that it does not take (CMYK).
    """
    library = _native()
    if library is None or data[:2] != b"\xff\xd8":
        return False
    try:
        width, height = open_image(data).size
    except (OSError, ValueError, BadImage):  # `decode_rgb` has the words for it
        return False
    file, out = np.frombuffer(data, np.uint8), np.empty((8, 8, 3), np.uint8)
    size, whole = len(data), (height, width, 0, 0, height, width)
    place = file.ctypes.data, size, 0, size, True
    status = library.ffcv_imnet_crop_resize(*place, *whole, out.ctypes.data, 8, 8, False)
    return bool(status == DAMAGED)


def has_plain_edge(rgb: Pixels) -> bool:
    """Whether all pixels of one edge are of one colour."""
    edges = rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]
    return any(bool((edge == edge[0]).all()) for edge in edges)


def _misread(image: Image.Image) -> str | None:
    """What of a TIFF Pillow would read as other pixels, or drop, without a word; None if nothing. See TIFF 6.0."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    channels = tags.get(277, 1)
    deep = max(tags.get(258, (1,))) > 8
    convert = "convert it to 8 bits a sample"
    if deep and channels > 1 and tags.get(284) == 2:
        return f"more than 8 bits a sample, channel after channel: {convert}"
    if deep and tags.get(262) == 0:
        return f"more than 8 bits a sample in which zero is white: {convert}"
    if 2 in tags.get(339, ()) and not deep:
        return "signed samples: convert it to unsigned ones"
    if channels > 4:
        return f"{channels} channels, of which three would be kept: make an image of the three that you want"
    with suppress(EOFError):
        size = image.size
        image.seek(1)
        more = image.size == size  # else a smaller copy for previews
        image.seek(0)
        if more:
            return (
                "several pages, of which the first would be kept: write each as a file of its own"
            )
    return None


def brightest(data: bytes) -> int | None:
    """The largest value of a whole file's 16-bit grayscale; None of any other image, or of none."""
    try:
        image = open_image(data)
        return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # `decode_rgb` has the words for it
        return None


def _upright(image: Image.Image) -> Image.Image:
    """`ImageOps.exif_transpose` without writing EXIF back, which is where damaged EXIF raises.

    An orientation that can be read is applied even if the rest of the block is broken, as any
    viewer does; one that cannot be read leaves the pixels as they lie.
    """
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # the parser raises SyntaxError, struct.error, ValueError, OverflowError...
        return image
    return image if method is None else image.transpose(method)


def open_image(data: bytes) -> Image.Image:
    """As Pillow does, with HEIC and AVIF where it can, and without its warnings.

    Raises:
        BadImage: it is one of these two, and this installation cannot.
        UnidentifiedImageError: it is none of our formats.
    """
    brand, formats = data[8:12] if data[4:8] == b"ftyp" else b"", FORMATS
    if brand in AVIF:
        if not features.check("avif"):
            raise BadImage("an AVIF image: `pip install --upgrade pillow` reads it")
        formats = ("AVIF",)
    if brand in HEIC:
        try:
            import pillow_heif
        except ImportError:
            raise BadImage("a HEIC image: `pip install pillow-heif` reads it") from None
        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=formats)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grayscale (I;16*, and I holding 16 bits) and floating point scaled to 8 bits; others
    unchanged.

    The full range is scaled, never the image's own: its brightness would then depend on its
    brightest pixel. White of floating point is the first of `FULL_SCALES` that holds all of it.

    Raises:
        ValueError: no range holds the values.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    wide = np.asarray(image)
    low, high = float(wide.min()), float(wide.max())
    scales = FULL_SCALES if image.mode == "F" else FULL_SCALES[-1:]
    white = next((scale for scale in scales if high <= scale), None)
    if white is None or not low >= 0:
        raise ValueError(
            f"values from {low:g} to {high:g}, of which none is known to be white: scale them to 0 to 65535"
        )
    narrow = np.empty(wide.shape, np.uint8)
    for row, values in enumerate(wide):  # one at a time: all in float64 would be gigabytes
        narrow[row] = np.floor(values.astype(np.float64) * (255 / white) + 0.5)
    return Image.fromarray(narrow)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def target_size(
    height: int, width: int, max_resolution: int | None, short_side: int | None
) -> tuple[int, int]:
    """(height, width) after shrinking; never larger than given, no side below one pixel."""
    reference, target = height, height
    if max_resolution is not None:
        reference, target = max(height, width), max_resolution
    elif short_side is not None:
        reference, target = min(height, width), short_side
    if target >= reference:
        return height, width
    # Whole numbers: 400 / 1333 * 1333 is not 400 in floating point.
    return (
        max(1, (height * target + reference // 2) // reference),
        max(1, (width * target + reference // 2) // reference),
    )


def shrink(rgb: Pixels, max_resolution: int | None, short_side: int | None) -> Pixels:
    """Resize by area averaging (OpenCV INTER_AREA, as ffcv) so that the longest side is at most
    `max_resolution`, or the shorter one at most `short_side`; None for both leaves it as it is."""
    height, width = target_size(rgb.shape[0], rgb.shape[1], max_resolution, short_side)
    if (height, width) == rgb.shape[:2]:
        return rgb
    small = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    return small.astype(np.uint8, copy=False)


def encode_jpeg(rgb: Pixels, quality: int) -> bytes:
    """JPEG (4:2:0) of (height, width, 3) uint8 RGB.

    Raises:
        BadImage: a side is longer than JPEG allows.
    """
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    try:
        done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    except cv2.error:
        done = False
    if not done:
        raise BadImage(f"{rgb.shape[1]} x {rgb.shape[0]} pixels cannot be stored as JPEG")
    return data.tobytes()

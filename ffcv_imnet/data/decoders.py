"""A decoder for FFCV whose crops and flips are a function of (seed, epoch, sample).

FFCV's own decoders draw from numba's per-thread generators: which thread meets which sample first
decides the pixels. Here every number comes from a counter-based generator, Philox4x32-10 (Salmon,
Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11; test vectors:
`kat_vectors` of the authors' Random123), so the pixels are the same at any number of threads and
processes.

Two decoders stand behind the same crops, and both shrink by area. `native/crop_resize.c`, where
set-up compiled it, decodes what the crop needs, at the scale that it needs. Without it FFCV's own
functions decode the whole JPEG: slower, and other pixels by a rounding or by the DCT's smoothing.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ffcv_imnet.data.fast_import  # noqa: F401

# isort: split
import llvmlite.binding
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, RGBImageField, SimpleRGBImageDecoder
from ffcv.libffcv import ctypes_imdecode, ctypes_resize
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from numba import carray, get_thread_id, prange, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from ffcv_imnet.config.domains import Choice, Number, argument
from ffcv_imnet.config.schema import checker_of
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data.jit import jit
from ffcv_imnet.native import build

MASK = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
UNIT = 1.0 / 2**32
ATTEMPTS = 10  # to fit a box of random area and aspect ratio, as torchvision and FFCV do


@jit()
def philox(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four random 32-bit words for a 64-bit key and a counter of four 32-bit words.

    Integers in, `uint64` out.
    """
    k0, k1 = np.uint64(key) & MASK, np.uint64(key) >> HALF
    x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * x0
        p1 = np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (p1 >> HALF) ^ x1 ^ k0, p1 & MASK, (p0 >> HALF) ^ x3 ^ k1, p0 & MASK
        k0 = (k0 + np.uint64(0x9E3779B9)) & MASK
        k1 = (k1 + np.uint64(0xBB67AE85)) & MASK
    return x0, x1, x2, x3


@jit(error_model="numpy")
def random_crop(
    height: int, width: int, seed: int, epoch: int, sample: int, scale: Any, ratio: Any
) -> tuple[int, int, int, int]:
    """The training crop of an image: top, left, height, width in px.

    Area uniform in `scale` of the image's, aspect ratio log-uniform in `ratio` (GoogLeNet's
    augmentation, arXiv:1409.4842, 6); attempt t reads block t + 1 of the sample's random stream.
    If none fits, the largest central box whose aspect ratio lies within `ratio`.
    """
    low, high = np.log(ratio[0]), np.log(ratio[1])
    for attempt in range(ATTEMPTS):
        a, b, c, d = philox(seed, sample, epoch, attempt + 1, 0)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * (a * UNIT))
        aspect = np.exp(low + (high - low) * (b * UNIT))
        w = round(np.sqrt(area * aspect))
        h = round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(c * UNIT * (height - h + 1)), int(d * UNIT * (width - w + 1)), h, w
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


@jit()
def mirrored(mode: int, seed: int, epoch: int, sample: int) -> bool:
    """Whether the sample is flipped in this epoch; `mode` is its place in `FLIPS`.

    Random: a bit of block 0 of the sample's random stream. Alternating (arXiv:2404.00498, 3.5): that
    bit of epoch 0, and the other one in every odd epoch, so that two epochs show both sides.
    """
    if mode == 0:
        return False
    drawn = np.uint64(epoch) if mode == 1 else np.uint64(0)
    bit = philox(seed, sample, drawn, 0, 0)[0] & np.uint64(1)
    if mode == 2:
        bit ^= np.uint64(epoch) & np.uint64(1)
    return bit == np.uint64(1)


@jit(error_model="numpy")
def central_crop(height: int, width: int, ratio: float) -> tuple[int, int, int, int]:
    """The validation crop: a central square whose side is `ratio` of the shorter side, px."""
    side = max(1, int(ratio * min(height, width)))
    return (height - side) // 2, (width - side) // 2, side, side


@jit()
def mirror(image: Any) -> None:
    """Flip an image (height, width, 3) left to right, in place."""
    height, width = image.shape[0], image.shape[1]
    for row in range(height):
        for left in range(width // 2):
            for channel in range(3):
                kept = image[row, left, channel]
                image[row, left, channel] = image[row, width - 1 - left, channel]
                image[row, width - 1 - left, channel] = kept


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer: compiled code sees what the host changes after its compilation."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uintp), generate


# Fields of the decoder's control block. FFCV compiles a decoder once and freezes what it closes
# over; what changes with the epoch is therefore read from memory, at a fixed address.
CONTROL = np.dtype(
    [
        ("seed", "<u8"),
        ("epoch", "<u8"),
        ("random", "<u8"),  # 1: random_crop, 0: central_crop
        ("flip", "<u8"),  # place in FLIPS
        ("scale", "<f8", 2),
        ("ratio", "<f8", 2),
        ("central", "<f8"),
        ("used", "<u8"),  # 1 once a batch of this epoch was decoded
    ]
)
WORDS = CONTROL.itemsize // 8
RANDOM_WORD, FLIP_WORD, SCALE_WORD, RATIO_WORD, CENTRAL_WORD, USED_WORD = 2, 3, 4, 6, 8, 9
FLIPS = ("none", "random", "alternating")
WHOLE_RANGE = (0.08, 1.0)  # of a crop's area: GoogLeNet's, torchvision's and FFCV's default
# What is wrong with a sample, by the number that a decoder leaves in `CropDecoder.damaged`.
DAMAGES = (
    "",
    "is damaged",
    "has another size than the file's table says",
    "is neither grey nor RGB",
    "did not fit into memory",
    "lies outside the file, or its crop outside the image",
    "takes too much memory or too many scans to decode",
)
DAMAGED, OTHER_SIZE, OUTSIDE, TOO_MUCH = 1, 2, 5, 6
JPEG = int(IMAGE_MODES["jpg"])
# Bounds on a progressive JPEG, as in crop_resize.c: scans, and bytes of three components' coefficients.
MOST_SCANS, MOST_COEFFICIENTS = 100, 512 << 20


@jit(error_model="numpy")
def chosen_crop(
    height: int, width: int, sample: int, words: Any, numbers: Any
) -> tuple[int, int, int, int]:
    """The crop that the control block, as `words` and as float `numbers`, asks for."""
    if words[RANDOM_WORD] == 0:
        return central_crop(height, width, numbers[CENTRAL_WORD])
    scale = numbers[SCALE_WORD : SCALE_WORD + 2]
    ratio = numbers[RATIO_WORD : RATIO_WORD + 2]
    return random_crop(height, width, words[0], words[1], sample, scale, ratio)


@jit()
def place_of(pointer: Any, pointers: Any, sizes: Any, length: int) -> tuple[Any, Any]:
    """Start and size of the stored bytes that the tables say, size 0 where those are not in the file.

    The tables were checked before the file was mapped; it may be another file's since.
    """
    place = np.searchsorted(pointers, pointer)
    if place >= len(pointers) or pointers[place] != pointer:
        return 0, 0
    size = sizes[place]
    if pointer > np.uint64(length) or size > np.uint64(length) - pointer:
        return 0, 0
    return np.int64(pointer), np.int64(size)


def stored_bytes(pointer: Any, storage: Any) -> Any:
    """In compiled code: the bytes of a sample, none where the tables place them outside the file.

    `storage` is what FFCV hands to decoders: the mapped file, or with `os_cache=False` the pages that it
    has read and where each of them is.
    """
    raise NotImplementedError


@overload(stored_bytes)
def _stored_bytes(pointer: Any, storage: Any) -> Callable[..., Any]:
    def of_mapping(pointer: Any, storage: Any) -> Any:
        file, pointers, sizes = storage
        start, size = place_of(pointer, pointers, sizes, len(file))
        return file[start : start + size]

    def of_pages(pointer: Any, storage: Any) -> Any:
        pages, pointers, sizes, slots = storage
        page_size = pages.shape[1]
        start, size = place_of(pointer, pointers, sizes, len(slots) * page_size)
        page, offset = start // page_size, start % page_size
        if size > page_size - offset:
            size = 0
        return pages[slots[page], offset : offset + size]

    return of_mapping if len(storage) == 3 else of_pages


@jit()
def fault_of_stored(stored: Any, jpeg: bool, height: int, width: int) -> int:
    """What keeps FFCV's functions from stored bytes, as a place in `DAMAGES`; they look at nothing."""
    if height == 0 or width == 0 or len(stored) < (1 if jpeg else 3 * height * width):
        return OUTSIDE
    return fault_of_jpeg(stored, height, width) if jpeg else 0


@jit()
def fault_of_jpeg(stored: Any, height: int, width: int) -> int:
    """Another size in the JPEG's own header, or a progressive one beyond the bounds."""
    at, size = 2, len(stored)
    while at + 9 < size and stored[at] == 0xFF:
        marker = stored[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        # SOF0 to SOF2: the Huffman-coded ones of 8 bits that turbojpeg reads.
        if 0xC0 <= marker <= 0xC2:
            if np.int64(stored[at + 5]) * 256 + stored[at + 6] != height:
                return OTHER_SIZE
            if np.int64(stored[at + 7]) * 256 + stored[at + 8] != width:
                return OTHER_SIZE
            count = scans(stored)
            held = 6 * height * width if count > 1 or marker == 0xC2 else 0  # its coefficients
            return TOO_MUCH if held > MOST_COEFFICIENTS or count > MOST_SCANS else 0
        at += 2 + np.int64(stored[at + 2]) * 256 + stored[at + 3]
    return DAMAGED


@jit()
def scans(stored: Any) -> int:
    """Start-of-scan markers in a JPEG; those of a thumbnail count too."""
    count = 0
    for at in range(len(stored) - 1):
        count += stored[at] == 0xFF and stored[at + 1] == 0xDA
    return count


_crop_resize: Any = types.ExternalFunction(build.FUNCTION, types.int64(*[types.int64] * 15))


@jit(parallel=True, error_model="numpy")
def _decode_natively(
    indices: Any,
    out: Any,
    metadata: Any,
    storage: Any,
    words: Any,
    numbers: Any,
    damaged: Any,
) -> None:
    """One batch through the C kernel. Compiled once a machine: it closes over nothing."""
    for slot in prange(len(indices)):
        sample = indices[slot]
        field = metadata[sample]
        stored = stored_bytes(field["data_ptr"], storage)
        height: Any = np.int64(field["height"])
        width: Any = np.int64(field["width"])
        top, left, h, w = chosen_crop(height, width, sample, words, numbers)
        damaged[sample] = _crop_resize(
            stored.ctypes.data,
            np.int64(len(stored)),
            np.int64(0),
            np.int64(len(stored)),
            np.int64(field["mode"] == JPEG),
            height,
            width,
            top,
            left,
            h,
            w,
            out[slot].ctypes.data,
            out.shape[1],
            out.shape[2],
            np.int64(mirrored(words[FLIP_WORD], words[0], words[1], sample)),
        )


@functools.cache
def native_kernel() -> ctypes.CDLL | None:
    """The C kernel, known to numba by its name and compiled if need be; None, said once, where it cannot be."""
    try:
        build.build()
    except RunError as error:
        print(
            f"the crop decoder is not compiled, so images are decoded whole, which is slower: {error}",
            file=sys.stderr,
            flush=True,
        )
        return None
    library = build.load()
    assert library is not None
    address = ctypes.cast(library.ffcv_imnet_crop_resize, ctypes.c_void_p).value
    llvmlite.binding.add_symbol(build.FUNCTION, address)
    return library


class CropDecoder(SimpleRGBImageDecoder):
    """FFCV decoder: crop, resize and perhaps mirror each image of a batch into uint8 (height, width, 3).

    It stands first in the pipeline of an image field of `ffcv.Loader`, where FFCV's
    RandomResizedCropRGBImageDecoder or CenterCropRGBImageDecoder stood, and takes their arguments.
    Of a JPEG it decodes the rows and columns of the crop alone, at the smallest DCT scale that suffices.
    Crops and flips are functions of (seed, epoch, sample), the same at any number of workers; the epoch
    is counted from 0 and goes on by itself with every pass of the loader.

    Args:
        output_size: (height, width) of the output, or its side, px. May be set anew between passes,
            `decoder.output_size = (160, 160)`; nothing is compiled again.
        scale: area of a random crop over that of its image, (least, most).
        ratio: width over height of a random crop, (least, most); or one number: the central square
            whose side is this part of the image's shorter side, as validation takes it.
        flip: mirror images: "none" (as RandomHorizontalFlip may follow), "random" (half of them), or
            "alternating" (every image in every second epoch, arXiv:2404.00498).
        seed: of crops and flips, from 0 to 2**63 - 1.
        on_damaged: "stop": the pass after one that met a stored image that does not decode raises
            RunError; "skip": it goes on. The image is black in either case: see `check`.
        whole: decode whole images, with FFCV's functions, even where the C kernel is there.

    Attributes:
        damaged: (samples,) int8, what was wrong with a sample when it was last decoded: a place
            in `DAMAGES`, 0 if nothing.
        control: (1,) of `CONTROL`, what compiled code reads of all this.

    Raises:
        UsageError: an argument out of its domain; in the constructor of the loader: a field that holds
            no images, or another operation before this one.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scale: tuple[float, float] = WHOLE_RANGE,
        ratio: float | tuple[float, float] = (3 / 4, 4 / 3),
        *,
        flip: str = "none",
        seed: int = 0,
        on_damaged: str = "stop",
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.on_damaged = argument("on_damaged", on_damaged, Choice(["stop", "skip"]))
        self.control = np.zeros(1, dtype=CONTROL)
        self.control["seed"] = argument("seed", seed, checker_of("training.seed"))
        self.control["flip"] = FLIPS.index(argument("flip", flip, checker_of("augmentation.flip")))
        self.control["scale"] = argument("scale", scale, checker_of("augmentation.crop_scale"))
        self.control["random"] = isinstance(ratio, list | tuple)
        if self.control["random"][0]:
            self.control["ratio"] = argument("ratio", ratio, checker_of("augmentation.crop_ratio"))
        else:
            self.control["central"] = argument("ratio", ratio, checker_of("validation.crop_ratio"))
            if tuple(scale) != WHOLE_RANGE:
                raise UsageError(
                    f"CropDecoder: ratio {ratio:g} takes the central square, for which there is no scale: leave"
                    f" scale out, or give ratio as (least, most) for random crops"
                )
        self.damaged = np.zeros(0, dtype=np.int8)
        # What compiled code points into, for as long as it may run; by kind and size.
        self.kept: dict[tuple[str, int], Any] = {}
        self.native = not whole and native_kernel() is not None

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of what comes out, px."""
        return self._output_size

    @output_size.setter
    def output_size(self, size: int | tuple[int, int]) -> None:
        sides = (size, size) if isinstance(size, int | np.integer) else size
        if not isinstance(sides, list | tuple) or len(sides) != 2:
            raise UsageError(f"output_size must be one side or (height, width), not {size!r}")
        height, width = (argument("output_size", side, Number(int, 1, 4096)) for side in sides)
        self._output_size = height, width

    def set_epoch(self, epoch: int) -> None:
        """The next pass is `epoch`, counted from 0, and those after it follow: a resumed run needs this."""
        self.control["epoch"] = argument("epoch", epoch, Number(int, 0, 2**32 - 1))
        self.control["used"] = 0

    def check(self) -> None:
        """Raises RunError for the first stored image that did not decode when it was last asked for."""
        if not self.damaged.any():
            return
        samples = np.flatnonzero(self.damaged)
        what = DAMAGES[self.damaged[samples[0]]]
        raise RunError(
            f"{len(samples):,} of the images did not decode, first that of sample {samples[0]}, which {what}: write"
            f' the .beton again, or take them as black images: CropDecoder(on_damaged="skip")'
        )

    def accept_field(self, field: Any) -> None:
        """FFCV says what it decodes."""
        if not isinstance(field, RGBImageField):
            raise UsageError(
                f"CropDecoder decodes images, and the field of this pipeline is a {type(field).__name__}"
            )
        super().accept_field(field)

    def accept_globals(self, metadata: Any, memory_read: Any) -> None:
        """FFCV gives it the table of the file's samples, at the start of every epoch too."""
        super().accept_globals(metadata, memory_read)
        # Not uint8, which numba would take as read-only.
        self.damaged = self._keep("damaged", len(metadata), np.int8)

    def _keep(self, kind: str, size: int, dtype: type) -> NDArray[Any]:
        if (kind, size) not in self.kept:
            try:
                self.kept[kind, size] = np.zeros(size, dtype)
            except MemoryError:
                raise RunError(
                    f"to decode its largest image whole takes {size / 1e9:,.1f} GB in all threads: store images "
                    f"smaller (write_ffcv.py --max_resolution), or compile the crop decoder (make setup)"
                ) from None
        return self.kept[kind, size]

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """FFCV asks this at construction and at the start of every epoch: the output buffer of an image."""
        if previous_state.shape is not None:
            raise UsageError("CropDecoder must be the first operation of its pipeline")
        if self.on_damaged == "stop":
            self.check()
        if self.control["used"][0]:
            self.set_epoch(int(self.control["epoch"][0]) + 1)
        shape = (*self.output_size, 3)
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1"))
        return state, AllocationQuery(shape, np.dtype("u1"))

    def generate_code(self) -> Callable[..., Any]:
        """The function that numba compiles: one batch, images in parallel."""
        return self._native_code() if self.native else self._plain_code()

    def _native_code(self) -> Callable[..., Any]:
        control_at, damaged_at = self.control.ctypes.data, self.damaged.ctypes.data
        samples = len(self.damaged)

        def decode(indices, destination, metadata, storage):  # type: ignore[no-untyped-def]
            control: Any = _pointer(control_at)  # type: ignore[call-arg]  # numba adds one
            marks: Any = _pointer(damaged_at)
            words = carray(control, WORDS, np.uint64)
            words[USED_WORD] = 1
            _decode_natively(
                indices,
                destination,
                metadata,
                storage,
                words,
                carray(control, WORDS, np.float64),
                carray(marks, samples, np.int8),
            )
            return destination[: len(indices)]

        return decode

    def _plain_code(self) -> Callable[..., Any]:
        heights = self.metadata["height"].astype(np.int64)
        widths = self.metadata["width"].astype(np.int64)
        stride = int((heights * widths).max()) * 3 if len(heights) else 0
        threads = Compiler.num_threads
        # An image is decoded into its thread's own scratch memory, not into a buffer per image of the
        # batch (at 500 px, batch 1024: a megabyte a core instead of 4 GB).
        scratch = self._keep("scratch", threads * stride, np.uint8)

        parallel = threads > 1
        scratch_at, control_at = scratch.ctypes.data, self.control.ctypes.data
        damaged_at, samples = self.damaged.ctypes.data, len(self.damaged)
        loop = Compiler.get_iterator()

        def decode(indices, destination, metadata, storage):  # type: ignore[no-untyped-def]
            used: Any = _pointer(control_at)  # type: ignore[call-arg]  # numba adds one
            carray(used, WORDS, np.uint64)[USED_WORD] = 1
            for slot in loop(len(indices)):
                control: Any = _pointer(control_at)
                words = carray(control, WORDS, np.uint64)
                numbers = carray(control, WORDS, np.float64)
                marks: Any = _pointer(damaged_at)
                damaged = carray(marks, samples, np.int8)
                sample = indices[slot]
                field = metadata[sample]
                stored = stored_bytes(field["data_ptr"], storage)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                pixels = stored
                jpeg = field["mode"] == JPEG
                damaged[sample] = fault_of_stored(stored, jpeg, height, width)
                if damaged[sample]:
                    destination[slot] = 0
                    continue
                if jpeg:
                    thread = get_thread_id() if parallel else 0
                    own: Any = _pointer(scratch_at + thread * stride)
                    pixels = carray(own, height * width * 3, np.uint8)
                    status = ctypes_imdecode(  # without a crop (0, 0), at scale 1 / 1
                        stored.ctypes.data, stored.size, height, width,
                        pixels.ctypes.data, height, width, 0, 0, 1, 1, False, False,
                    )  # fmt: skip
                    if status != 0:
                        damaged[sample] = DAMAGED
                        destination[slot] = 0
                        continue
                top, left, h, w = chosen_crop(height, width, sample, words, numbers)
                ctypes_resize(
                    0, pixels.ctypes.data, height, width, top, top + h, left, left + w,
                    destination[slot].ctypes.data, destination.shape[1], destination.shape[2],
                )  # fmt: skip
                if mirrored(words[FLIP_WORD], words[0], words[1], sample):
                    mirror(destination[slot])
            return destination[: len(indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode

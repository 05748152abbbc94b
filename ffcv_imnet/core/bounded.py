"""What a file may cost before anything in it is believed: its length, its parts, the memory of a reader.

Many times larger than those of any honest file; a reader that needs no bound of ours (safetensors
compares its header with the file's length) is not in here.
"""

import errno
import json
import os
import resource
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ffcv_imnet.core.paths import open_regular

SPARE = 1 << 30  # bytes of address space for a reader's libraries and buffers, whatever it reads
THREAD = 192 << 20  # and for each thread: glibc reserves 128 MB of heap and 8 MB of stack


def read_at_most(path: Path | str, most: int) -> bytes:
    """A whole file of at most `most` bytes.

    Raises:
        OSError: it cannot be opened, is larger, or is a folder, pipe or device; says which.
    """
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length > most:
            raise OSError(errno.EINVAL, f"it has more than {in_words(most)}", str(path))
        return file.read(length)  # not `most`, for which Python would make room


def read_json(path: Path | str, most: int = 64 << 20) -> Any:
    """The value in a file of JSON of at most `most` bytes.

    Raises:
        OSError: see `read_at_most`.
        ValueError: it is no JSON, or no value of ours: nested too deeply, or with a number that is none.
    """
    try:
        return json.loads(read_at_most(path, most), parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def no_number(name: str) -> float:
    """For json's `parse_constant`: raises ValueError for NaN and Infinity, which are not JSON."""
    raise ValueError(f"it has {name}, which is no number of JSON")


def in_words(count: int) -> str:
    """A bound of `count` bytes, in the largest unit that divides it."""
    for shift, unit in ((30, "GB"), (20, "MB"), (10, "kB")):
        if count >= 1 << shift and not count & ((1 << shift) - 1):
            return f"{count >> shift:,} {unit}"
    return f"{count:,} bytes"


def fault_of_zip(archive: zipfile.ZipFile, file: BinaryIO) -> str | None:
    """What keeps a zip's parts from being pieces of `file`, each stored as it is, once; None if nothing.

    So the parts of what torch.save writes come to no more than the file has bytes.
    """
    end, above = os.fstat(file.fileno()).st_size, 0
    parts = sorted(archive.infolist(), key=lambda part: part.header_offset)
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            return "its parts are compressed, and could unpack to any size"
        if part.header_offset < above or part.header_offset + part.file_size > end:
            return "its parts lie over each other or outside the file"
        above = part.header_offset + part.file_size
    name, times = Counter(part.filename for part in parts).most_common(1)[0] if parts else ("", 1)
    return f"it has two parts named {name[:60]!r}" if times > 1 else None


@contextmanager
def memory_at_most(extra: int, threads: int = 0) -> Iterator[None]:
    """Within, this process may ask for `extra` bytes and `SPARE`; what asks for more gets none (MemoryError,
    or what a library makes of it).

    It is the address space that is bounded: for readers that touch about what they ask for. Not to be
    used where other threads allocate. `threads`: as many may be started within, which reserve what they
    never touch.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):  # no Linux: no bound
        yield
        return
    most = pages * resource.getpagesize() + extra + SPARE + threads * THREAD
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

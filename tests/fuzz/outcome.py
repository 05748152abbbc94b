"""What reading one mutated file comes to, within bounds on processor time and memory."""

import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.images.pixels import BadImage

LONGEST = 600  # characters of a message, the file's name not counted
PATIENCE = 10.0  # seconds of processor time
LARGEST = 5 << 28  # bytes of memory that reading may add: 1 GB, and a quarter for the reader itself
CEILING = 8 << 30  # of address space beyond the start's: a case ends there, the machine does not


class Wrong(AssertionError):
    """It was accepted, and is none."""


class Late(BaseException):
    """`PATIENCE` is over; not an Exception, which readers turn into sentences."""


def outcome(read: Callable[[], object], path: Path) -> str:
    """ "read", "refused", or what went wrong: a key that begins with neither is a failure."""
    before, started = _now("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    signal.setitimer(signal.ITIMER_PROF, 1.5 * PATIENCE)
    try:
        read()
        said = "read"
    except (UsageError, RunError, BadImage, OSError) as error:
        text = str(error).replace(str(path), "")
        # An OSError is what a source of images may answer with; run_main has words for any other.
        said = "refused" if "\n" not in text and len(text) < LONGEST else "refused at length"
        if re.search(r"<[\w.]+ object at 0x|Traceback", text):
            said = "refused in a program's words"
    except Late:
        said = "too late"
    except Wrong as error:
        said = f"accepted: {error}"
    except Exception as error:
        said = f"traceback: {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if time.process_time() - started > PATIENCE:
        said = "too late"
    return f"{said}, too large" if _now("VmHWM") - before > LARGEST else said


@contextmanager
def bounded() -> Iterator[None]:
    """Around the calls of `outcome`: what a late case is told by, and a ceiling of memory."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGPROF, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_now("VmSize") + CEILING, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def _now(name: str) -> int:
    words = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert words
    return int(words[1]) << 10


def blind(data: bytes, draw: random.Random, words: list[bytes], most: int = 4) -> bytes:
    """Bytes changed, moved, repeated, truncated; `words` put in."""
    held = bytearray(data)
    for _ in range(draw.randint(1, most)):
        at, kind = draw.randrange(len(held) + 1), draw.randrange(8)
        if kind <= 1 and at < len(held):
            held[at] ^= 1 << draw.randrange(8)
        elif kind == 2 and at < len(held):
            held[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 3:
            held[at : at + draw.choice([0, 4, 8])] = draw.choice(words)
        elif kind == 4:
            del held[at : at + draw.randint(1, 40)]
        elif kind == 5:
            held[at:at] = held[at : at + draw.randint(1, 200)]
        elif kind == 6:  # a number of four bytes, as sizes are
            number = draw.choice([0, 1, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
            held[at : at + 4] = number.to_bytes(4, draw.choice(["little", "big"]))
        elif draw.random() < 0.3:
            del held[at:]
    return bytes(held)

"""Reading ahead in a mapped file: the disk is asked for images before they are decoded."""

import mmap
from threading import Semaphore, Thread
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from ffcv_imnet.data.jit import jit

PAGE, WILLNEED = mmap.PAGESIZE, mmap.MADV_WILLNEED
REQUEST = 128 << 10  # bytes; the kernel cuts a request that is longer than the disk's own limit

_madvise: Any = types.ExternalFunction(
    "madvise", types.int32(types.uintp, types.uintp, types.int32)
)


class ReadAhead(Thread):
    """Has the kernel read the images of the batches to come, in the epoch's order.

    Decoding threads that meet a missing page wait for the disk, one request each, and the kernel
    guesses what to read around it, four times an image of 36 kB. Told beforehand, it keeps the disk's
    queue full and reads the image alone. What is in memory already costs a look. A thread of its
    own, because the call waits where the disk's queue is full.

    Args:
        file: the mapped file, as bytes.
        starts, ends: (samples,), where each sample's bytes lie in it.
        batches: the samples of each batch, in order.
        ahead: batches to ask for besides the one that is being decoded.
    """

    def __init__(
        self,
        file: NDArray[np.uint8],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        batches: list[NDArray[np.int64]],
        ahead: int,
    ) -> None:
        super().__init__(daemon=True)
        self.file, self.starts, self.ends, self.batches = file, starts, ends, batches
        self.left = False
        self.room = Semaphore(ahead)
        self.start()

    def run(self) -> None:
        for samples in self.batches:
            self.room.acquire()
            if self.left:
                return
            _ask(self.file.ctypes.data, *stretches(self.starts[samples], self.ends[samples]))

    def begin_batch(self) -> None:
        """The next batch is about to be decoded: one more may be asked for."""
        self.room.release()

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self.left = True
        self.room.release()
        self.join()


def stretches(
    starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends with what follows its neighbour joined to it: validation goes through the file."""
    cuts = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    return starts[np.r_[0, cuts]], ends[np.r_[cuts - 1, -1]]


@jit()
def _ask(file_at: int, starts: Any, ends: Any) -> None:
    """madvise(2) that these stretches are wanted; does not wait for them.

    Compiled: from Python each of these hundreds of calls would have to wait for the interpreter's
    lock, which the training step holds most of the time.
    """
    for number in range(len(starts)):
        for start in range(starts[number] // PAGE * PAGE, ends[number], REQUEST):
            size = min(REQUEST, ends[number] - start)
            _madvise(np.uint64(file_at + start), np.uint64(size), np.int32(WILLNEED))

"""Work on all images of a source in worker processes, the results handed back in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import spawn
from typing import Protocol, Self, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.core.errors import RunError

CHUNK = 16  # images a task: enough to hide its cost, few enough to keep the window small
WINDOW = 16  # tasks in flight at least: results are taken in order, and one may be all huge images

T = TypeVar("T")


class Divisible(Protocol):
    """What can be sent to a worker a few items at a time; an `ImageSource` is one."""

    def __len__(self) -> int: ...

    def subset(self, indices: NDArray[np.int64]) -> Self:
        """These items alone, in this order."""


S = TypeVar("S", bound=Divisible)


def in_order(
    source: S,
    work: Callable[[S, NDArray[np.int64]], list[T]],
    num_workers: int,
    order: NDArray[np.int64] | None = None,
) -> Generator[list[T], None, None]:
    """`work(part, indices)` for a few images of `source` at a time, by `num_workers` processes.

    Memory is bounded by the window of chunks in flight. Close the iterator to stop early: its
    workers are then killed, whatever they are doing.

    Args:
        work: can be pickled; `indices` are the places in `source` of the images of `part`.
        order: indices in the order in which they are worked on; all, as they stand, by default.

    Raises:
        RunError: a worker died or ran out of memory.
    """
    order = np.arange(len(source)) if order is None else order
    others = set(multiprocessing.active_children())
    pool = _pool(num_workers)
    pending: deque[Future[list[T]]] = deque()
    starts = iter(range(0, len(order), CHUNK))
    started = finished = False

    def submit(count: int) -> None:
        for _, first in zip(range(count), starts, strict=False):
            indices = order[first : first + CHUNK]
            pending.append(pool.submit(work, source.subset(indices), indices))

    try:
        # Workers start here and inherit the mask, so Ctrl-C reaches this process alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            submit(max(WINDOW, 3 * num_workers))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while pending:
            chunk = pending.popleft().result()
            started = True
            submit(1)
            yield chunk
        finished = True
    except (BrokenProcessPool, BrokenPipeError, MemoryError):
        raise _died(num_workers, started) from None
    finally:
        if not finished:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(num_workers: int) -> ProcessPoolExecutor:
    # spawn: the caller may have threads, and a forked copy of a held lock never opens.
    context = multiprocessing.get_context("spawn")
    if not os.access(program := os.fsdecode(spawn.get_executable()), os.X_OK):
        raise RunError(
            f"this user may not start {program}, which worker processes run: install Python in a folder that the "
            "user may read"
        )
    try:
        return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    except BrokenPipeError:  # of the process that counts the locks, started as the workers are
        raise _died(num_workers, False) from None


def _died(num_workers: int, started: bool) -> RunError:
    start = f"; or does {os.fsdecode(spawn.get_executable())} not start for this user?"
    return RunError(
        "a worker process died, probably for want of memory:"
        f" try fewer than --num_workers {num_workers}{'' if started else start}"
    )


def one_thread() -> None:
    """One thread for OpenCV in this process: the workers are the parallelism."""
    cv2.setNumThreads(0)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one_thread()
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    # A killed parent leaves no end-of-file on the pool's queues: its workers would stay for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""The one way a file gets its final name: whole and on the disk, or not at all.

Write under a temporary name in the same folder, force the bytes to the disk, rename, force the
folder. Without the first fsync a power cut can leave an empty file under the final name; without the
second the name itself can be gone after it was announced.
"""

import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ffcv_imnet.core.errors import RunError, not_written, system_error

CACHED = 1 << 21  # bytes: the largest piece in which Linux keeps and drops what it caches of a file
# What file systems answer that cannot force a folder (some network ones): nothing can be done there.
UNFORCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class NotWritten(RunError):
    """A file could not be written under its name; what bore the name before still does."""

    def __init__(self, path: Path, error: BaseException) -> None:
        super().__init__(not_written(path, error))


def partial_path(path: Path) -> Path:
    """The temporary name under which `path` is written."""
    return path.with_name(path.name + ".partial")


@contextmanager
def atomic_write(
    path: Path, mode: str = "wb", *, sync: bool = True, shared: bool = False
) -> Iterator[IO[Any]]:
    """A file open for writing that becomes `path` when the block ends well, and is removed if not.

    Args:
        path: its final name; what bears it is replaced in one step.
        mode: "wb", or "w" for UTF-8 text.
        sync: False only where nothing is lost with the file: it need not survive a power cut.
        shared: several processes may write it at once.

    Raises:
        NotWritten: the disk is full, the folder is gone or read-only. Other errors pass unchanged.
    """
    own = path.with_name(f"{path.name}.{os.getpid()}.partial") if shared else partial_path(path)
    with written(path, mode, partial=own, sync=sync) as file:
        yield file
    rename(own, path, sync=sync, discard=True)


@contextmanager
def written(
    path: Path, mode: str = "wb", *, partial: Path | None = None, sync: bool = True
) -> Iterator[IO[Any]]:
    """The first half of `atomic_write`, for what is checked before `rename`: `path` under its
    temporary name, forced to the disk when the block ends well and removed if not."""
    partial = partial or partial_path(path)
    file: IO[Any] | None = None
    try:
        file = open_named(partial, mode)
        yield file
        if sync:
            force(file)
        file.close()
    except BaseException as error:
        with suppress(OSError):
            if file is not None:
                file.close()  # writes what it still holds, which may fail as well
        with suppress(OSError):
            partial.unlink()
        if _is_of(error, partial, path):
            raise NotWritten(path, error) from error
        raise


def rename(partial: Path, path: Path, *, sync: bool = True, discard: bool = False) -> None:
    """The second half: `partial`, a file or folder, becomes `path`, or is removed if it is to be discarded
    when it cannot. Raises NotWritten."""
    try:
        partial.replace(path)
        if sync:
            force_folder(path.parent)
    except OSError as error:
        if discard:
            with suppress(OSError):  # it may have its name, and only the folder was not forced
                partial.unlink()
        raise NotWritten(path, error) from error


def link(source: Path, target: Path) -> None:
    """Make `target` the file that `source` is, in one step. Raises NotWritten.

    A hard link where the file system has them: for files that are replaced and never changed.
    """
    partial = partial_path(target)
    try:
        if target.exists() and target.samefile(source):  # a rename would leave the partial one
            return
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            with written(target) as copy, source.open("rb") as original:
                shutil.copyfileobj(original, copy)
    except OSError as error:
        raise NotWritten(target, error) from error
    rename(partial, target, discard=True)


def locked(file: int | IO[Any]) -> bool:
    """Whether this process alone has `file` from here on, until it is closed. On a file system without locks it has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def make_folder(path: Path) -> None:
    """Like `mkdir -p`, and the disk keeps every new folder's name. Raises OSError."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(new):  # `parents=True` calls itself for each of thousands
        folder.mkdir(exist_ok=True)
        force_folder(folder.parent)
    path.mkdir(exist_ok=True)  # raises where it is a file


def force(file: IO[Any]) -> None:
    """Have the disk keep what was written to `file`. Raises OSError that names it."""
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def force_folder(path: Path) -> None:
    """Have the disk keep the names in `path`, where its file system can. Raises OSError."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in UNFORCED:
            return
        raise
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in UNFORCED:
            error.filename = str(path)
            raise
    finally:
        os.close(folder)


def drop_cached(file: IO[bytes], offset: int = 0, size: int = 0) -> None:
    """Ask the system to forget its copy of `size` bytes of `file` (0: to the end), so that the next
    read comes from the disk. They must have been forced there before: it keeps what was not.

    Advice only: a file system in memory ignores it, and so may others.
    """
    first = offset // CACHED * CACHED
    length = -(-(offset + size) // CACHED) * CACHED - first if size else 0
    with suppress(OSError):
        os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_DONTNEED)


def open_named(path: Path, mode: str) -> IO[Any]:
    """`open` for writing, whose errors name the file: the system's do so only on opening."""
    if "b" in mode:
        return io.BufferedWriter(_Raw(path, mode.replace("b", "")), 1 << 20)
    # Names of files that are no UTF-8 are written as they were.
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(path, mode)), encoding="utf-8", errors="surrogateescape"
    )


class _Raw(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = self.name
            raise


def _is_of(error: BaseException, *paths: Path) -> bool:
    """Whether `error` comes of writing one of `paths`; torch hides the system's behind its own."""
    system = system_error(error)
    name = system.filename if system is not None else None
    return name is not None and os.fspath(name) in {str(path) for path in paths}

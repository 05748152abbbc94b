"""Files at an address: s3://BUCKET/NAME, gs://, https:// and what else fsspec knows, copied here once, and put there.

The copy of an address lies in a folder of its own below the cache's. It is downloaded under its temporary
name, goes on where it was stopped, and gets its name when its manifest has been found to be true. Of the
processes on one machine the first copies, the others wait for it.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ffcv_imnet.config.schema import Data
from ffcv_imnet.core.atomic import (
    NotWritten,
    atomic_write,
    force,
    locked,
    make_folder,
    partial_path,
    rename,
)
from ffcv_imnet.core.bounded import read_json
from ffcv_imnet.core.errors import RunError, UsageError, reason_of
from ffcv_imnet.core.optional import require
from ffcv_imnet.core.paths import is_address
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.core.units import of_disk
from ffcv_imnet.data import beton
from ffcv_imnet.data.manifest import LARGEST, Manifest, manifest_path

BLOCK = 1 << 25  # bytes of one request: few enough requests, and little is lost with one
AT_ONCE = 4  # requests; one alone is often held to some 100 MB/s
TRIES = 5  # of a block, 1, 2, 4 and 8 seconds apart: a connection that breaks is no reason to begin again
INSTALL = "'fsspec[s3]'  # or [gcs], [http], [adl]"


@dataclass(frozen=True)
class Origin:
    """What an address held when it was looked at; two that are equal held the same bytes."""

    address: str
    bytes: int
    token: str  # of its time, ETag, version: whatever the store tells
    files: Any = field(default=None, compare=False, repr=False)  # fsspec's file system
    path: str = field(default="", compare=False)  # within it


# ---- one address ---------------------------------------------------------------------------------


def look(address: str) -> Origin:
    """What is there now.

    Raises:
        UsageError: no such file, no permission, or a package is missing.
        RunError: its store does not answer.
    """
    fsspec = client(address)
    with said(address):
        try:
            files, path = fsspec.core.url_to_fs(address)
        except ValueError as error:
            raise UsageError(f"{address}: {reason_of(error)}") from None
        found = files.info(path)
        if found.get("type") == "directory":
            raise UsageError(f"{address} is a folder: name the file in it")
        if found.get("size") is None:
            raise RunError(f"{address}: its server does not say how large it is")
        return Origin(address, int(found["size"]), str(files.ukey(path)), files, path)


@contextmanager
def said(address: str, doing: str = "read", then: str = "") -> Iterator[None]:
    """What clients of stores raise, of many kinds, as one sentence with the address."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except FileNotFoundError:
        raise UsageError(f"{address} does not exist") from None
    except PermissionError as error:
        raise UsageError(
            f"{address} cannot be {doing} ({reason_of(error)}): may this machine's credentials?"
        ) from None
    except Exception as error:
        raise RunError(f"{address} could not be {doing} ({reason_of(error)}){then}") from error


def client(address: str) -> Any:
    """fsspec, found to have what speaks to the store of `address`; the store is not asked. Raises UsageError."""
    fsspec = require("fsspec", address, INSTALL)
    try:
        fsspec.get_filesystem_class(address.split("://", 1)[0])
    except (
        ImportError,
        ValueError,
    ) as error:  # which says what to install, or that nothing would help
        raise UsageError(f"{address}: {reason_of(error)}") from None
    return fsspec


def copy_path(address: str, cache_dir: Path) -> Path:
    """Where the copy of `address` is kept. Beside it `manifest_path` is that of its manifest."""
    name = PurePosixPath(address.split("://", 1)[1]).name
    if not name:
        raise UsageError(f"{address} names no file")
    folder, _, _ = address.rpartition("/")
    return cache_dir / hashlib.sha256(folder.encode()).hexdigest()[:12] / name


def beside(address: str) -> str:
    """The address of a .beton's manifest, which bears its name but for the suffix."""
    folder, _, name = address.rpartition("/")
    return f"{folder}/{manifest_path(Path(name))}"


# ---- download ------------------------------------------------------------------------------------


def fetch(address: str, cache_dir: Path) -> Path:
    """A file's copy here, made if it is not there yet or the file has changed.

    Raises:
        UsageError: there is no such file, or the disk has no room for it.
        RunError: the download failed; what has come is kept, and the next call goes on with it.
    """
    target = copy_path(address, cache_dir)
    with alone(target):
        origin = look(address)
        if not is_copy(target, origin):
            download(origin, target)
            rename(partial_path(target), target)
    return target


def local_path(place: Path | str, cache_dir: Path) -> Path:
    """A path itself; of an address its copy here, as `fetch_beton` and `fetch` make it."""
    if isinstance(place, Path):
        return place
    beton_like = place.endswith((".beton", ".ffcv"))
    return (fetch_beton if beton_like else fetch)(place, cache_dir)


def fetch_beton(address: str, cache_dir: Path) -> Path:
    """Like `fetch`, with the manifest beside it, and found to be what that says.

    A file without a manifest is copied as it is. Where the store does not answer, a whole copy will do.
    """
    target = copy_path(address, cache_dir)
    with alone(target):
        beton.repair_beton(target)
        try:
            origin = look(address)
        except RunError as error:
            if not noted(target):
                raise
            print(f"{error}: the copy {target} is used", flush=True)
            return target
        if is_copy(target, origin):
            return target
        try:
            waiting = fetch_manifest(address, partial_path(manifest_path(target)))
        except UsageError:  # of another writer
            download(origin, target)
            rename(partial_path(target), target)
            return target
        download(origin, target)
        verify(address, partial_path(target), waiting)
        beton.commit_beton(target)
    return target


def fetch_manifest(address: str, path: Path) -> Path:
    """The manifest of the .beton at `address`, copied to `path`. Raises as `look` does."""
    origin = look(beside(address))
    if origin.bytes > LARGEST:
        raise RunError(f"{origin.address} has {origin.bytes:,} bytes: it is no manifest")
    with said(origin.address):
        text = origin.files.cat_file(origin.path)
    place(path.parent)
    with atomic_write(path) as file:
        file.write(text)
    return path


def verify(address: str, path: Path, manifest: Path) -> None:
    """Raises RunError, and removes the copy, unless it is whole what its manifest says."""
    try:
        expected = beton.check_beton(path, manifest).content_checksum
        if beton.content_checksum(path) == expected:
            return
        fault = "its images or labels are not those of its manifest"
    except (RunError, UsageError) as error:
        fault = str(error)
    path.unlink()
    raise RunError(f"{address} was copied and removed again: {fault}")


def download(origin: Origin, target: Path) -> None:
    """The bytes of `origin` under the temporary name of `target`, from where an earlier call was stopped."""
    partial, folder = partial_path(target), target.parent
    if noted(target) != origin:  # begun from other bytes
        for old in (target, manifest_path(target), partial):
            old.unlink(missing_ok=True)
        note(target, origin)
    have = min(partial.stat().st_size, origin.bytes) if partial.exists() else 0
    free = shutil.disk_usage(folder).free
    if origin.bytes - have > free:
        raise UsageError(
            f"{origin.address} has {of_disk(origin.bytes)} and {folder} has {of_disk(free)} free: make room, or"
            f" name a folder on another disk (data.cache_dir, of write_ffcv.py --cache_dir)"
        )
    try:
        # Buffered: a raw file's write may take less than it is given.
        with (
            partial.open("ab") as file,
            Progress(origin.bytes >> 20, f"copying {target.name}", "MB", initial=have >> 20) as bar,
        ):
            file.truncate(have)
            for block in blocks(origin, have):
                file.write(block)
                bar.update((file.tell() >> 20) - bar.done)
            force(file)
    except OSError as error:
        raise NotWritten(target, error) from error
    if (have := partial.stat().st_size) != origin.bytes:
        raise RunError(
            f"{origin.address} ended after {have:,} of {origin.bytes:,} bytes: try again"
        )


def blocks(origin: Origin, start: int) -> Iterator[bytes]:
    """The file's bytes from `start` in order, some blocks requested ahead."""
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for first in range(start, origin.bytes, BLOCK):
                waiting.append(pool.submit(read, origin, first, min(first + BLOCK, origin.bytes)))
                if len(waiting) == AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read(origin: Origin, first: int, end: int) -> bytes:
    """Bytes [first, end). Raises RunError once it has failed `TRIES` times."""
    for attempt in range(TRIES):
        try:
            data: bytes = origin.files.cat_file(origin.path, start=first, end=end)
            if len(data) == end - first:
                return data
            fault = f"{len(data):,} of {end - first:,} bytes came"
        except (FileNotFoundError, PermissionError) as error:
            raise RunError(f"{origin.address} went away: {reason_of(error)}") from error
        except Exception as error:  # a client's own, of many kinds
            fault = reason_of(error)
        if attempt < TRIES - 1:
            time.sleep(2**attempt)
    raise RunError(
        f"{origin.address} could not be read from byte {first:,} ({fault}): what has come is kept, the same"
        " command goes on with it"
    )


# ---- upload --------------------------------------------------------------------------------------


def manifest_at(address: str, cache_dir: Path) -> Manifest | None:
    """The manifest of the .beton that is at `address` already; None where there is none."""
    path = copy_path(address, cache_dir)
    seen = path.with_name(f"{path.name}.there.json")
    try:
        length = look(address).bytes
        found = Manifest.load(fetch_manifest(address, seen))
    except UsageError:
        return None
    return found if found.bytes == length else None


def put_beton(path: Path, address: str) -> None:
    """Upload a .beton, then its manifest, which makes it whole for others; the file here is its copy.

    Raises:
        UsageError, RunError: it could not be written there; the file here is kept.
    """
    fsspec = client(address)
    for local, to in ((path, address), (manifest_path(path), beside(address))):
        length = local.stat().st_size
        with (
            said(to, "written", f": {path} is kept, the same command only uploads it"),
            Progress(length >> 20, f"uploading {local.name}", "MB") as bar,
        ):
            files, there = fsspec.core.url_to_fs(to)
            files.makedirs(there.rpartition("/")[0], exist_ok=True)
            files.put_file(str(local), there, callback=moving(bar, fsspec.callbacks.Callback))
        if (found := look(to)).bytes != length:
            raise RunError(f"{to} has {found.bytes:,} bytes after the upload, not {length:,}")
        if local == path:
            note(path, found)


def moving(bar: Progress, base: Any) -> Any:
    """fsspec's callback, an heir of `base`, which moves a bar."""

    class Moving(base):
        def call(self, *_: Any, **__: Any) -> None:
            bar.update((self.value >> 20) - bar.done)

    return Moving()


# ---- the copies here -----------------------------------------------------------------------------


def place(folder: Path) -> None:
    """Make the folder. Raises UsageError."""
    try:
        make_folder(folder)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made ({error.strerror}): name another folder with data.cache_dir, of"
            f" write_ffcv.py --cache_dir"
        ) from None


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """One process of this machine at a time copies `target`."""
    place(target.parent)
    with target.with_name(target.name + ".lock").open("wb") as lock:
        if not locked(lock):
            print(f"another process is copying {target}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def note_path(target: Path) -> Path:
    return target.with_name(target.name + ".origin")


def note(target: Path, origin: Origin) -> None:
    """Keep what `target` is, or is going to be, a copy of."""
    kept = {"address": origin.address, "bytes": origin.bytes, "token": origin.token}
    with atomic_write(note_path(target), "w") as file:
        json.dump(kept, file)


def noted(target: Path) -> Origin | None:
    """What `note` kept."""
    try:
        kept = read_json(note_path(target))
        return Origin(str(kept["address"]), int(kept["bytes"]), str(kept["token"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def is_copy(target: Path, origin: Origin) -> bool:
    """Whether `target` is whole and of these bytes."""
    return target.is_file() and noted(target) == origin and target.stat().st_size == origin.bytes


def local_copies(data: Data, manifests_only: bool = False) -> Data:
    """`data` with the paths of the copies in place of addresses; of the manifests' copies where only those are
    wanted. Raises as `fetch` and `look` do."""
    cache = Path(data.cache_dir)

    def local(path: str) -> str:
        if not is_address(path):
            return path
        if not manifests_only:
            return str(fetch_beton(path, cache))
        copy = copy_path(path, cache)
        try:
            fetch_manifest(path, manifest_path(copy))
        except UsageError as error:
            raise UsageError(f"{path} is not there, or not with its manifest: {error}") from None
        return str(copy)

    return replace(
        data, train_dataset=local(data.train_dataset), val_dataset=local(data.val_dataset)
    )

"""Compile crop_resize.c, and find the result again.

    python -m ffcv_imnet.native.build           what `make setup` runs, and the loader at its first use
    python -m ffcv_imnet.native.build --check   exit status 1 unless it is built and loads

It stands beside its source, or in the user's cache where that folder is not the user's to write in
(installed for all users). The library's name carries a checksum of its source, of the options and of the kind of processor: a
library of yesterday's source is never loaded. It needs a C compiler and libjpeg-turbo's headers
(Debian: libjpeg-dev); without it training works, through FFCV's own decoder, and is slower.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ffcv_imnet.core.atomic import rename
from ffcv_imnet.core.errors import RunError, not_written, run_main

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "crop_resize.c"
FUNCTION = "ffcv_imnet_crop_resize"
# No contraction to fused multiply-adds: weights, and so pixels, do not depend on the processor.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fvisibility=default", "-shared", "-fPIC")


def library_path() -> Path:
    """Where the library of this source, these options and this kind of processor stands."""
    content = SOURCE.read_bytes() + " ".join((*FLAGS, platform.machine())).encode()
    name = f"crop_resize-{hashlib.sha256(content).hexdigest()[:12]}.so"
    if (FOLDER / name).is_file() or os.access(FOLDER, os.W_OK):
        return FOLDER / name
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ffcv_imnet" / name


def load() -> ctypes.CDLL | None:
    """The library; None if it is not built, or not for the libjpeg that is installed now."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except OSError:
        return None
    library.ffcv_imnet_crop_resize.argtypes = [ctypes.c_int64] * 15
    library.ffcv_imnet_crop_resize.restype = ctypes.c_int64
    library.ffcv_imnet_scratch_bytes.restype = ctypes.c_int64
    return library if library.ffcv_imnet_scratch_bytes() > 0 else None


def build() -> Path:
    """Compile under a temporary name, try it, give it its name.

    Raises:
        RunError: no compiler, no libjpeg headers, no place for it, or a library that does not load.
    """
    path = library_path()
    if load() is not None:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(not_written(path, error)) from None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise RunError(f"no C compiler called {compiler[0]}: install build-essential, or set CC")
    partial = path.with_suffix(f".{os.getpid()}.partial")
    command = [*compiler, *FLAGS, *_jpeg("--cflags"), str(SOURCE), "-o", str(partial)]
    command += [*(_jpeg("--libs") or ["-ljpeg"]), *_rpath(), "-pthread"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if path.parent == FOLDER:  # in the cache another version of the package may use them
        for old in set(FOLDER.glob("crop_resize-*.so")) - {path}:
            old.unlink(missing_ok=True)
    if load() is None:
        path.unlink()
        raise RunError(
            f"{path} was compiled but does not load: are libjpeg-turbo's headers its own?"
        )
    return path


def _jpeg(what: str) -> list[str]:
    """What pkg-config says of libjpeg; nothing if it knows nothing."""
    if shutil.which("pkg-config") is None:
        return []
    done = subprocess.run(["pkg-config", what, "libjpeg"], capture_output=True, text=True)
    return shlex.split(done.stdout)


def _rpath() -> list[str]:
    """A library outside the system's folders (conda's) is found again when ours is loaded."""
    folders = [flag[2:] for flag in _jpeg("--libs-only-L") if flag.startswith("-L")]
    return [f"-Wl,-rpath,{folder}" for folder in folders]


def main() -> int:
    """Build, or with --check only look. Exit status as elsewhere."""
    if "--check" in sys.argv[1:]:
        return 0 if load() is not None else 1
    print(f"crop decoder: {build().name}")
    return 0


if __name__ == "__main__":
    run_main(main)

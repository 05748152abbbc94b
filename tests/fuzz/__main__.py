"""Throw forged tables and mutated files of all kinds at the project for a while; counts as JSON.

python -m tests.fuzz tables --seconds 3600 --sanitize
python -m tests.fuzz manifests --cases 80000
python -m tests.fuzz settings --cases 24000
python -m tests.fuzz checkpoints --cases 20000      and of READERS below

`--sanitize` compiles the decoder under gcc's address and undefined-behaviour sanitizers, which end the
process at the first access that is wrong. Exit status 0: nothing crashed, hung or was accepted wrongly.
"""

import argparse
import ctypes
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from ffcv_imnet.native import build

READERS = ["checkpoints", "logs", "mats", "labels", "images", "safetensors", "parquet", "onnx"]
PLACE = "FUZZ_LIBRARY"  # names the sanitized library for the process that was started with them
FLAGS = "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def main() -> int:
    """Parse, start anew under the sanitizers if asked, fuzz."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("what", choices=["tables", "manifests", "settings", *READERS])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--cases", type=int, default=80_000, help="not of tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loader_every", type=float, default=20.0, help="seconds")
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    if options.sanitize and PLACE not in os.environ:
        start_sanitized()
    if PLACE in os.environ:
        take(Path(os.environ[PLACE]))
    if options.what == "settings":
        from tests.fuzz.settings import fuzz as fuzz_settings

        counts: dict[str, int] = fuzz_settings(options.cases, options.seed)
    elif options.what == "checkpoints":
        from tests.fuzz.checkpoints import fuzz as fuzz_checkpoints

        counts = fuzz_checkpoints(options.cases, options.seed)
    elif options.what in READERS:
        from tests.fuzz.readers import fuzz as fuzz_readers

        counts = fuzz_readers(options.what, options.cases, options.seed)
    elif options.what == "manifests":
        from tests.fuzz.manifests import fuzz as fuzz_manifests

        counts = fuzz_manifests(options.cases, options.seed)
    else:
        from tests.fuzz.tables import fuzz as fuzz_tables

        counts = fuzz_tables(options.seconds, options.seed, options.loader_every)
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    return 0


def start_sanitized() -> None:
    """Compile the decoder with the sanitizers and become a process that has them from its start."""
    library = Path(os.environ.get("TMPDIR", "/tmp")) / f"crop_resize-sanitized-{os.getuid()}.so"
    flags = [flag for flag in build.FLAGS if flag != "-O3"] + shlex.split(FLAGS)
    jpeg = [*build._jpeg("--cflags"), *(build._jpeg("--libs") or ["-ljpeg"])]
    subprocess.run(["gcc", *flags, str(build.SOURCE), "-o", str(library), *jpeg], check=True)
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True)
        runtimes.append(done.stdout.strip())
    os.environ |= {
        PLACE: str(library),
        "LD_PRELOAD": " ".join(runtimes),
        # Python leaves memory behind; numba's code handles its own signals.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "NUMBA_CACHE_DIR": str(library.with_suffix(".numba")),
    }
    os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]])


def take(library: Path) -> None:
    """Load this library in place of the one that is built."""

    def load() -> ctypes.CDLL:
        loaded = ctypes.CDLL(str(library))
        loaded.ffcv_imnet_scratch_bytes.restype = ctypes.c_int64
        return loaded

    build.load = load


if __name__ == "__main__":
    sys.exit(main())

"""The data of the acceptance: generated images, the bundle's Imagenette, files in which images repeat.

    python -m acceptance.data --out DIR --bundle BUNDLE

makes DIR/work/shapes (generated), DIR/work/imagenette (the bundle's, else generated) and
DIR/work/photos (the bundle's full-size images at 400 px, else generated), and DIR/machine.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from ffcv_imnet.core import provenance
from ffcv_imnet.core.errors import Parser, RunError, run_main
from ffcv_imnet.data.beton import BetonWriter, read_tables
from ffcv_imnet.images import synthetic
from ffcv_imnet.images.stored import Stored
from ffcv_imnet.machine import host

VAL_OF_TRAIN = 4  # one validation image to so many training images


def main() -> int:
    """Make what is missing; the mark `complete` is written last."""
    parser = Parser(prog="python -m acceptance.data", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--train_per_class", type=int, required=True)
    options = parser.parse_args()
    work = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "complete").is_file():
        make(work, options)
    (options.out / "machine.json").write_text(json.dumps(machine(options.device), indent=1) + "\n")
    (work / "complete").touch()
    return 0


def make(work: Path, options: argparse.Namespace) -> None:
    """All three folders."""
    number = options.train_per_class
    synthetic.write_tree(work / "images", number, max(1, number // VAL_OF_TRAIN))
    for split in ("train", "val"):
        command = ["write_ffcv.py", "--split", split, "--data_dir", str(work / "images")]
        command += ["--out_dir", str(work / "shapes")]
        if subprocess.run([sys.executable, *command]).returncode:
            raise RunError("write_ffcv.py failed; its message stands above")
    for name in ("imagenette", "photos"):
        shutil.rmtree(work / name, ignore_errors=True)
        packed = options.bundle / f"{name}.tar.gz"
        # A rehearsal has no time for thirteen thousand images.
        if packed.is_file() and (name != "imagenette" or options.device == "cuda"):
            with tarfile.open(packed) as file:
                file.extractall(work / name, filter="data")
            print(f"{name}: {packed}")
        else:
            shutil.copytree(work / "shapes", work / name)


def machine(device: str) -> dict[str, Any]:
    """What the report names."""
    import torch

    from ffcv_imnet.machine.device import choose
    from ffcv_imnet.machine.distributed import usable_cores

    found = host.find_nvidia()
    gpu = device == "cuda"
    chosen = choose(device)
    return {
        "device": torch.cuda.get_device_name(chosen) if gpu else provenance.cpu_name(),
        "driver": found.driver or "none",
        "CUDA of torch": torch.version.cuda or "none",
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability(chosen)))
        if gpu
        else "none",
        "GPUs": torch.cuda.device_count() if gpu else 0,
        "processor": f"{provenance.cpu_name()}, {usable_cores()} of {os.cpu_count()} cores",
        "versions": ", ".join(
            f"{name} {version}" for name, version in provenance.versions().items()
        ),
        "commit": provenance.git_commit() or "not a git checkout",
    }


def repeated(source: Path, target: Path, samples: int) -> Path:
    """A .beton of at least `samples` samples: those of `source` over and over, their bytes once.

    So a short file keeps many cores busy. Loaders read it; training refuses it, as its samples overlap.
    """
    if target.is_file():
        return target
    tables = read_tables(source)
    n = len(tables.labels)
    times = -(-samples // n)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with source.open("rb") as images, partial.open("wb") as file:
        writer = BetonWriter(file, n * times)
        for i in range(n):
            images.seek(int(tables.pointers[i]))
            data = images.read(int(tables.sizes[i]))
            shape = int(tables.heights[i]), int(tables.widths[i])
            writer.add(Stored(int(tables.labels[i]), int(tables.modes[i]), *shape, data, b""))
        for copy in range(1, times):
            rows = slice(copy * n, (copy + 1) * n)
            writer.metadata[rows] = writer.metadata[:n]
            writer.allocations[rows] = writer.allocations[:n]
        writer.samples = n * times
        writer.finish()
    partial.replace(target)
    return target


if __name__ == "__main__":
    run_main(main)

"""CPU time of the loader for an image, by stored size, crop scale and resolution: README.md beside it says how.

python records/2026-11-25_decode_rates/measure.py FOLDER ROUNDS > rates.json

FOLDER holds 256/train.beton, 320/..., 400/... and 500/..., the same images written at those longest sides.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core import provenance
from ffcv_imnet.data.beton import BetonWriter, read_tables
from ffcv_imnet.data.loader import TrainLoader
from ffcv_imnet.images.stored import Stored
from ffcv_imnet.machine.distributed import World

TIMES = 24  # each image is listed so many times: a pass of 125 would be too short
STORED, SCALES, SIDES = (256, 320, 400, 500), (0.08, 0.25, 0.5), (128, 160, 192)


def repeated(path: Path) -> Path:
    """The same file with each image listed `TIMES` times."""
    tables = read_tables(path)
    n, out = len(tables.labels), path.with_name("repeated.beton")
    with path.open("rb") as source, out.open("wb") as file:
        writer = BetonWriter(file, n * TIMES)
        for i in range(n):
            source.seek(int(tables.pointers[i]))
            data = source.read(int(tables.sizes[i]))
            shape = int(tables.heights[i]), int(tables.widths[i])
            writer.add(Stored(int(tables.labels[i]), int(tables.modes[i]), *shape, data, b""))
        for copy in range(1, TIMES):
            rows = slice(copy * n, (copy + 1) * n)
            writer.metadata[rows], writer.allocations[rows] = (
                writer.metadata[:n],
                writer.allocations[:n],
            )
        writer.samples = n * TIMES
        writer.finish()
    return out


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    world = World(0, 1, 0, 1, torch.device("cpu"))
    loaders, rows = {}, []
    for size in STORED:
        path = repeated(folder / str(size) / "train.beton")
        samples = len(read_tables(path).labels)
        settings = load(
            data__train_dataset=str(path), data__num_workers=1, training__batch_size=250,
            resolution__min_res=max(SIDES), resolution__max_res=max(SIDES),
        )  # fmt: skip
        loaders[size] = (
            TrainLoader(str(path), samples, settings, world),
            plan_run(settings, samples)[0],
        )
    from dataclasses import replace

    for number in range(rounds + 1):
        for side in SIDES:
            for scale in SCALES:
                for size, (loader, plan) in loaders.items():
                    wanted = replace(plan, epoch=number, resolution=side, crop_scale=(scale, 1.0))
                    wall, cpu, images = time.perf_counter(), time.process_time(), 0
                    for batch, _ in loader.epoch(wanted):
                        images += len(batch)
                    row = {
                        "round": number, "stored": size, "crop_scale": scale, "resolution": side,
                        "images": images, "cpu_seconds": round(time.process_time() - cpu, 4),
                        "wall_seconds": round(time.perf_counter() - wall, 4),
                    }  # fmt: skip
                    if number:  # the first compiles and warms up
                        rows.append(row)
        print("round", number, file=sys.stderr, flush=True)
    made = {
        "processor": provenance.cpu_name(),
        "git_commit": provenance.git_commit(),
        "versions": provenance.versions(),
    }
    print(json.dumps(made | {"load_average": os.getloadavg()}, indent=1)[:-2] + ',\n "passes": [\n  '
          + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}")  # fmt: skip


if __name__ == "__main__":
    main()

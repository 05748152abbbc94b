"""Rehearse ImageNet's count with small generated images: tars, .beton, verify, first steps.

python -m ffcv_imnet rehearse --dir /big/disk/rehearsal

1,281,167 images in 1,000 inner tars and 50,000 in a flat one take 3 GB, their .beton 2 GB. Prints
wall time and peak memory of every step and the time from command to first batch. The folder is
removed at the end unless --keep is given.
"""

import argparse
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.tools import ToolParser

POOL = 512  # different images; every image is one of them
SIDE = 48  # pixels
NAMES = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "val_labels.txt"


def main(argv: list[str]) -> int:
    """Exit status 0 if every step succeeded."""
    options = parse(argv)
    if options.first_steps is not None:
        return first_steps(options.dir, options.first_steps, options.device)
    if not Path("write_ffcv.py").is_file():
        raise UsageError("the rehearsal runs from the repository's root: write_ffcv.py is not here")
    folder: Path = options.dir
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--dir {folder} is not empty, and it would be removed at the end")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        make_archives(folder, options.images, options.val_images, options.classes)
        results = rehearse(folder, options.device)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = ToolParser("rehearse", __doc__)
    add = parser.add_argument
    add("--dir", type=path_of, required=True, metavar="DIR", help="an empty or new folder; 6 GB")
    add("--images", type=int, default=1_281_167, metavar="N", help="(default: %(default)s)")
    add("--val_images", type=int, default=50_000, metavar="N", help="(default: %(default)s)")
    add("--classes", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    add("--keep", action="store_true", help="do not remove the folder")
    parser.add_device()
    add("--first_steps", type=float, help=argparse.SUPPRESS)  # the tool calling itself
    options = parser.parse_args(argv)
    if not 1 <= options.classes <= min(options.images, options.val_images):
        raise UsageError("--classes must be at least 1 and at most the number of images")
    return options


def small_images() -> list[bytes]:
    """JPEGs of smooth random colours."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (POOL, 4, 4, 3), dtype=np.uint8)
    big = [cv2.resize(c, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for c in coarse]
    return [cv2.imencode(".jpg", image)[1].tobytes() for image in big]


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """One file, by whatever name, at time 0."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def make_archives(folder: Path, images: int, val_images: int, classes: int) -> None:
    """The two archives in ImageNet's packing, and the labels of the flat one."""
    pool = small_images()
    train, val, labels = (folder / name for name in NAMES)
    wnids = [f"n{10_000_000 + 7 * number:08d}" for number in range(classes)]
    number = 0
    bar = Progress(images, "making the train tar")
    with tarfile.open(train, "w", format=tarfile.USTAR_FORMAT) as outer, bar as progress:
        for label, wnid in enumerate(wnids):
            count = images // classes + (label < images % classes)
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for _ in range(count):
                    add_member(archive, f"{wnid}_{number}.JPEG", pool[number % POOL])
                    number += 1
            add_member(outer, f"{wnid}.tar", inner.getvalue())
            progress.update(count)
    with tarfile.open(val, "w", format=tarfile.USTAR_FORMAT) as archive, labels.open("w") as text:
        for number in range(val_images):
            add_member(archive, f"ILSVRC2012_val_{number + 1:08d}.JPEG", pool[number % POOL])
            text.write(f"ILSVRC2012_val_{number + 1:08d} {wnids[number % classes]}\n")


def rehearse(folder: Path, device: str) -> dict[str, dict[str, float]]:
    """Seconds and peak memory (MB) of every step."""
    train, val, labels = (folder / name for name in NAMES)
    write = ["write_ffcv.py", "--out_dir", str(folder), "--split"]
    results = {
        "write train": measure([*write, "train", "--tar", str(train)]),
        "write val": measure([*write, "val", "--tar", str(val), "--val_labels", str(labels)]),
        "verify": measure(["-m", "ffcv_imnet", "verify", str(folder)]),
    }
    steps = [
        "-m",
        "ffcv_imnet",
        "rehearse",
        "--dir",
        str(folder),
        "--device",
        device,
        "--first_steps",
    ]
    results["train"] = measure([*steps, str(time.time())])
    first = json.loads((folder / "first_steps.json").read_text())
    results["train"] |= first
    for step, said in results.items():
        print(f"{step:12}", "  ".join(f"{name} {value:,.1f}" for name, value in said.items()))
    return results


def measure(command: list[str]) -> dict[str, float]:
    """Run Python on `command`; wall time and the largest sum of its and its children's memory.

    Raises:
        RunError: it failed.
    """
    print(f"\n$ python {' '.join(command)}", flush=True)
    started = time.perf_counter()
    peak = [0.0, 0.0]
    with subprocess.Popen([sys.executable, *command]) as process:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                own, *others = (proportional_memory(pid) for pid in family(process.pid))
                peak[0], peak[1] = max(peak[0], own), max(peak[1], own + sum(others))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        done.set()
        watcher.join()
    if status:
        raise RunError(f"{command[0]} ended with status {status}; its own message stands above")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory MB": peak[0], "with workers MB": peak[1]}


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        found += [int(child) for child in children]
    return found


def proportional_memory(pid: int) -> float:
    """Anonymous memory of a process plus its share of what it maps, in MB; 0 if it has ended.

    Files that are only cached do not count: mapping the .beton is not using memory.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    sizes = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return int(sizes.get("Pss_Anon", sizes["Pss"])) / 1000


def first_steps(folder: Path, started: float, device: str) -> int:
    """What `train_imagenet.py` does until the first batch, then four steps of training."""
    from ffcv_imnet.config.parsing import load
    from ffcv_imnet.config.schedules import plan_run
    from ffcv_imnet.data.loader import TrainLoader, ValLoader, check_data
    from ffcv_imnet.machine.distributed import connect, describe_world, disconnect
    from ffcv_imnet.train.checkpoint import Trained
    from ffcv_imnet.train.epoch import build_learner, train_epoch
    from ffcv_imnet.train.watch import Watch

    settings = load(
        data__train_dataset=str(folder / "train.beton"),
        data__val_dataset=str(folder / "val.beton"),
        resolution__min_res=64,
        resolution__max_res=64,
        validation__resolution=64,
        training__batch_size=64,
    )
    imported = time.time() - started
    world = describe_world(device)
    train_set, val_set = check_data(settings.data)
    connect(world)
    checked = time.time() - started
    loader = TrainLoader(settings.data.train_dataset, train_set.samples, settings, world)
    ValLoader(settings.data.val_dataset, val_set.samples, settings, world)
    learner = build_learner(settings, len(train_set.classes), world)
    loaded = time.time() - started
    plan = plan_run(settings, train_set.samples)[0]
    batches = loader.epoch(plan)
    next(batches)
    first = time.time() - started
    batches.close()
    plan = dataclasses.replace(plan, steps=4)
    trained = train_epoch(learner, loader, plan, settings.schedule, Trained(), Watch(world))
    disconnect(world)
    said = {
        "imports s": imported,
        "checked s": checked,
        "loaders s": loaded,
        "first batch s": first,
        "loss": trained.loss_sum / trained.steps,
    }
    (folder / "first_steps.json").write_text(json.dumps(said))
    print(f"first batch {first:.1f} s after the command, of which imports {imported:.1f} s")
    return os.EX_OK

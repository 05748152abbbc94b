"""The numbers of records/*_data: indexing, writing against its own limit and stock FFCV, ways in.

python -m tests.measure_writing index --dir D
python -m tests.measure_writing write --dir D --tree data/imagenet/train
python -m tests.measure_writing ways --dir D --train_tar T --val_tar V --val_labels L

Run by hand on a quiet machine, files in the page cache. What is compared runs in alternation, each
in a process of its own; seconds are counted from after its imports. One line of JSON a run.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_imnet.images import ImageSource
from ffcv_imnet.machine.host import usable_cores

ROOT = Path(__file__).parents[1]


def child(*words: object) -> dict[str, float]:
    """This script again, as one of the runs; what it measured."""
    command = [sys.executable, "-m", "tests.measure_writing", "--run", *map(str, words)]
    os.sync()  # what the last run wrote is not to be paid for by this one
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr}")
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"run": [str(word) for word in words], **said}), flush=True)
    return said


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds and the process's largest memory, in MB."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


# --------------------------------------------------------------------------------------- index


def make_small_members(path: Path, count: int) -> None:
    """A flat tar of tiny files."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:08d}.JPEG")
            member.size = 100
            archive.fileobj.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(512))
            archive.offset += 1024


def run_index(path: str) -> dict[str, float]:
    """The headers of a tar that has no cached index."""
    from ffcv_imnet.images.tar import index_tar

    found: list[int] = []
    said = timed(lambda: found.append(len(index_tar(Path(path)).names)))
    Path(f"{path}.index.npz").unlink(missing_ok=True)
    return {"members": found[0], **said, "members/s": round(found[0] / said["seconds"])}


def measure_index(given: argparse.Namespace) -> None:
    """Five times, from the page cache."""
    path = given.dir / "million.tar"
    if not path.exists():
        make_small_members(path, given.members)
    child("index", path)  # fills the page cache
    rates = [child("index", path)["members/s"] for _ in range(5)]
    print(f"{statistics.median(rates):,.0f} members/s ({min(rates):,.0f} to {max(rates):,.0f})")


# --------------------------------------------------------------------------------------- write


def only_encode(part: ImageSource, numbers: NDArray[np.int64]) -> list[int]:
    """What a worker of the writer does, with nothing handed back."""
    from ffcv_imnet.data import beton
    from ffcv_imnet.images.encode import PixelSettings, encode_chunk

    return [len(encode_chunk(part, numbers, PixelSettings(), beton.PAGE_SIZE))]


def run_limit(tree: str, workers: str) -> dict[str, float]:
    """Decode, shrink, encode; no writing."""
    from ffcv_imnet.images.folder import ImageFolderTree
    from ffcv_imnet.images.parallel import in_order

    def work() -> None:
        with closing(in_order(ImageFolderTree(Path(tree)), only_encode, int(workers))) as chunks:
            for _ in chunks:
                pass

    return timed(work)


def run_ours(tree: str, workers: str, out: str) -> dict[str, float]:
    """All that the command does, the check of the file included."""
    import write_ffcv

    folder = Path(tree)
    words = ["--split", folder.name, "--data_dir", str(folder.parent), "--out_dir", out, "--force"]
    return timed(lambda: write_ffcv.main([*words, "--num_workers", workers]))


def run_stock(tree: str, workers: str, out: str) -> dict[str, float]:
    """FFCV's own writer over torchvision's ImageFolder, the same pixels and quality."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    def work() -> None:
        image = RGBImageField(write_mode="jpg", max_resolution=400, jpeg_quality=90)
        fields = {"image": image, "label": IntField()}
        writer = DatasetWriter(f"{out}/stock.beton", fields, num_workers=int(workers))
        writer.from_indexed_dataset(ImageFolder(tree), chunksize=100)

    return timed(work)


def measure_write(given: argparse.Namespace) -> None:
    """Limit, ours, stock in alternation."""
    workers = usable_cores()
    images = sum(1 for path in given.tree.glob("*/*"))
    seconds: dict[str, list[float]] = {"limit": [], "ours": [], "stock": []}
    for _ in range(given.rounds):
        seconds["limit"].append(child("limit", given.tree, workers)["seconds"])
        for name in ("ours", "stock"):
            seconds[name].append(child(name, given.tree, workers, given.dir)["seconds"])
    for name, times in seconds.items():
        rates = [images / one for one in times]
        print(f"{name} {statistics.median(rates):,.0f} images/s ({min(rates):,.0f} to {max(rates):,.0f})")  # fmt: skip
    for name in ("limit", "stock"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)]
        print(f"ours is {statistics.median(ratios):.3f} of {name} ({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip


# ---------------------------------------------------------------------------------------- ways


def shell(*words: object) -> None:
    """One of the project's commands, silently."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True)


def checksums(out: Path) -> list[str]:
    """Of train and val."""
    return [
        json.loads((out / f"{s}.json").read_text())["content_checksum"] for s in ("train", "val")
    ]


def by_tars(given: argparse.Namespace, work: Path) -> None:
    """Read in place."""
    write = ("write_ffcv.py", "--out_dir", work / "out", "--split")
    shell(*write, "train", "--tar", given.train_tar)
    shell(*write, "val", "--tar", given.val_tar, "--val_labels", given.val_labels)


def by_tree(given: argparse.Namespace, work: Path) -> None:
    """Unpacked by `prepare` first."""
    tars = ("--train_tar", given.train_tar, "--val_tar", given.val_tar)
    words = (*tars, "--val_labels", given.val_labels, "--out_dir", work / "tree")
    shell("-m", "ffcv_imnet", "prepare", *words)
    for split in ("train", "val"):
        shell("write_ffcv.py", "--out_dir", work / "out", "--split", split, "--data_dir", work / "tree")  # fmt: skip


def by_kaggle(given: argparse.Namespace, work: Path) -> None:
    """Kaggle's zip unpacked first."""
    shell("-m", "zipfile", "-e", given.dir / "kaggle.zip", work / "kaggle")
    for split in ("train", "val"):
        shell("write_ffcv.py", "--out_dir", work / "out", "--split", split, "--data_dir", work / "kaggle")  # fmt: skip


def make_kaggle_zip(given: argparse.Namespace) -> None:
    """The same images as Kaggle packs them."""
    from ffcv_imnet.images.labels import read_labels
    from ffcv_imnet.images.tar import TarArchive

    sources = {
        "train": TarArchive(given.train_tar),
        "val": TarArchive(given.val_tar, read_labels(given.val_labels)),
    }
    with zipfile.ZipFile(given.dir / "kaggle.zip", "w") as archive:
        archive.write(given.val_labels, "LOC_val_solution.csv")
        for split, source in sources.items():
            for index in range(len(source)):
                name = source.name(index) if split == "train" else source.file(index)
                archive.writestr(f"ILSVRC/Data/CLS-LOC/{split}/{name}", source.read(index)[0])


def measure_ways(given: argparse.Namespace) -> None:
    """From what was downloaded to the two .beton, in alternation."""
    if not (given.dir / "kaggle.zip").exists():
        make_kaggle_zip(given)
    seconds: dict[str, list[float]] = {}
    found = []
    for _ in range(given.rounds):
        for way in (by_tars, by_tree, by_kaggle):
            work = given.dir / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            for tar in (given.train_tar, given.val_tar):  # the cached index is part of the way
                Path(f"{tar}.index.npz").unlink(missing_ok=True)
            started = time.perf_counter()
            way(given, work)
            seconds.setdefault(way.__name__, []).append(time.perf_counter() - started)
            found.append(checksums(work / "out"))
            said = {"run": way.__name__, "seconds": round(seconds[way.__name__][-1], 2)}
            print(json.dumps({**said, "checksums": found[-1]}), flush=True)
    for name, times in seconds.items():
        print(f"{name}: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})")
    print("the same checksums:", all(one == found[0] for one in found))


def main() -> int:
    """Exit status 0 if it was measured."""
    if sys.argv[1:2] == ["--run"]:
        runs = {"index": run_index, "limit": run_limit, "ours": run_ours, "stock": run_stock}
        print(json.dumps(runs[sys.argv[2]](*sys.argv[3:])))  # type: ignore[operator]
        return 0
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=("index", "write", "ways"))
    for name in ("--dir", "--tree", "--train_tar", "--val_tar", "--val_labels"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--members", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    measures = {"index": measure_index, "write": measure_write, "ways": measure_ways}
    measures[given.what](given)
    return 0


if __name__ == "__main__":
    sys.exit(main())

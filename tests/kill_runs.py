"""Kill every way of reading the images at three moments, run it again, compare what came out.

python -m tests.kill_runs --train_tar ILSVRC2012_img_train.tar --val_tar ILSVRC2012_img_val.tar \\
    --val_labels LOC_val_solution.csv --dir /big/disk/kills

Run by hand (tests/test_kill_runs.py runs a small one). The moments are fractions of what the
undisturbed run wrote, not of its time, so that a busy machine changes nothing. Parquet is left out
where pyarrow is not installed. The folder is kept: it holds the tree and Kaggle's layout.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_imnet.data.beton import Manifest
from ffcv_imnet.images.folder import ImageFolderTree

ROOT = Path(__file__).parents[1]
MOMENTS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Way:
    """One way from the images to a result in a folder."""

    name: str
    command: tuple[str, ...]  # --out_dir is added
    written: Callable[[Path], int]  # bytes or files so far, in the folder
    half: Callable[[Path, Path], bool]  # whether something unfinished has its final name in the
    # first folder; the second holds the undisturbed run's
    checksum: Callable[[Path], str]


@dataclass(frozen=True)
class Killed:
    """One run that was killed and repeated."""

    way: str
    moment: float  # asked for
    reached: float  # of the undisturbed run's output, when it was killed
    half: bool  # whether something unfinished had its final name after the kill
    same: bool  # whether the repeated run ended with the undisturbed run's checksum
    checksum: str


def beton_way(name: str, split: str, *options: object) -> Way:
    """`write_ffcv.py` with these options; its progress is the size of the unfinished file."""

    def written(out: Path) -> int:
        return max((p.stat().st_size for p in out.glob(f"{split}.beton*")), default=0)

    return Way(
        name,
        ("write_ffcv.py", "--split", split, *map(str, options)),
        written,
        lambda out, _: (out / f"{split}.beton").exists(),
        lambda out: Manifest.load(out / f"{split}.json").content_checksum,
    )


def prepare_way(*options: object) -> Way:
    """`prepare`; its progress is the number of files, finished or hidden."""
    command = ("-m", "ffcv_imnet", "prepare", *map(str, options))
    return Way("prepare", command, count_files, has_half_a_class, tree_checksum)


def count_files(out: Path) -> int:
    """Files anywhere below."""
    return sum(len(files) for _, _, files in os.walk(out))


def has_half_a_class(out: Path, undisturbed: Path) -> bool:
    """Whether a class folder stands in its place without all of its files."""
    return any(
        count_files(folder) != count_files(undisturbed / folder.relative_to(out))
        for folder in out.glob("[!.]*/*")
    )


def tree_checksum(out: Path) -> str:
    """SHA-256 over names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(out)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def start(way: Way, out: Path) -> subprocess.Popen[bytes]:
    """The run, its words in OUT.log."""
    with Path(f"{out}.log").open("ab") as log:
        words = [sys.executable, *way.command, "--out_dir", str(out)]
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)


def finish(way: Way, out: Path) -> None:
    """Run to the end. Raises RuntimeError where that fails."""
    if status := start(way, out).wait():
        raise RuntimeError(f"{way.name} ended with status {status}, see {out}.log")


def kill_at(way: Way, out: Path, target: int) -> int:
    """Start, SIGKILL when `target` is written; what was written."""
    process = start(way, out)
    while (done := way.written(out)) < target and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    if process.wait() == 0:
        raise RuntimeError(f"{way.name} was over before it could be killed")
    return done


def kill_runs(way: Way, folder: Path, moments: Sequence[float] = MOMENTS) -> list[Killed]:
    """All the kills of one way, below `folder`."""
    folder.mkdir(parents=True)
    finish(way, folder / "undisturbed")
    whole = way.written(folder / "undisturbed")
    wanted = way.checksum(folder / "undisturbed")
    found = []
    for moment in moments:
        out = folder / f"killed at {moment}"
        done = kill_at(way, out, int(moment * whole))
        half = way.half(out, folder / "undisturbed")
        finish(way, out)
        got = way.checksum(out)
        found.append(Killed(way.name, moment, round(done / whole, 3), half, got == wanted, got))
    return found


# ------------------------------------------------------------------------------------ the layouts


def make_kaggle(tree: Path, labels: Path, target: Path) -> Path:
    """Kaggle's layout of the tree, by hard links."""
    inside = target / "ILSVRC/Data/CLS-LOC"
    for split in ("train", "val"):
        for path in (tree / split).glob("*/*"):
            folder = inside / split / (path.parent.name if split == "train" else "")
            folder.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.name)
    (target / "LOC_val_solution.csv").write_bytes(labels.read_bytes())
    return target


def make_parquet(tree: Path, target: Path, shards: int = 4) -> Path:
    """The tree as the Hugging Face hub publishes ImageNet. Raises ImportError without pyarrow."""
    import pyarrow
    import pyarrow.parquet

    target.mkdir()
    for split, published in (("train", "train"), ("val", "validation")):
        source = ImageFolderTree(tree / split)
        order = np.random.default_rng(0).permutation(len(source))
        features = {"label": {"names": [f"the class {n}" for n in source.classes]}}
        said = {"huggingface": json.dumps({"info": {"features": features}})}
        for number, part in enumerate(np.array_split(order, shards)):
            rows: list[dict[str, Any]] = []
            for index in part.tolist():
                wnid, file = source.name(index).split("/")
                path = f"{Path(file).stem}_{wnid}{Path(file).suffix}"
                rows.append({"bytes": source.read(index)[0], "path": path})
            table = pyarrow.table({"image": rows, "label": source.labels[part]})
            name = f"{published}-{number:05}-of-{shards:05}.parquet"
            pyarrow.parquet.write_table(
                table.replace_schema_metadata(said), target / name, row_group_size=100
            )
    return target


def all_ways(train_tar: Path, val_tar: Path, labels: Path, folder: Path) -> list[Way]:
    """Every way in; tree and Kaggle's layout are made once, below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    both = ("--train_tar", train_tar, "--val_tar", val_tar, "--val_labels", labels)
    tree, kaggle, shards = folder / "tree", folder / "kaggle", folder / "parquet"
    if not kaggle.exists():
        finish(prepare_way(*both), tree)
        make_kaggle(tree, labels, kaggle)
    ways = [
        beton_way("tar, train", "train", "--tar", train_tar),
        beton_way("tar, val", "val", "--tar", val_tar, "--val_labels", labels),
    ]
    for split in ("train", "val"):
        ways.append(beton_way(f"tree, {split}", split, "--data_dir", tree))
        ways.append(beton_way(f"Kaggle, {split}", split, "--data_dir", kaggle))
    try:
        if not shards.exists():
            make_parquet(tree, shards)
        ways += [
            beton_way(f"parquet, {split}", split, "--parquet", shards) for split in ("train", "val")
        ]
    except ImportError:
        print("pyarrow is not installed: parquet is left out")
    return [*ways, prepare_way(*both)]


def main() -> int:
    """Exit status 0 if every repeated run ended as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name in ("--train_tar", "--val_tar", "--val_labels", "--dir"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of ways, for instance prepare")
    given = parser.parse_args()
    found: list[Killed] = []
    tar, val, labels, folder = (
        p.absolute() for p in (given.train_tar, given.val_tar, given.val_labels, given.dir)
    )
    for way in all_ways(tar, val, labels, folder):
        if given.only and way.name not in given.only:
            continue
        for killed in kill_runs(way, folder / way.name):
            print(json.dumps(asdict(killed)), flush=True)
            found.append(killed)
    return int(not all(killed.same and not killed.half for killed in found))


if __name__ == "__main__":
    sys.exit(main())

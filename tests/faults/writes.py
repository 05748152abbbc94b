"""A disk that fills at every single write: each command with its n-th request for room refused, all n.

    python -m tests.faults.writes --dir /some/disk --only train

The requests are those of `nth_write.c`. After each failure: one sentence and status 1 or 2 (or 0, where nothing
that counts was refused), no file half-written under its final name, no partial one left; and once there is
room, the same command makes what it makes undisturbed.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch

import train_imagenet
import write_ffcv
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.core.log import read_log
from ffcv_imnet.data import beton
from ffcv_imnet.tools import export, report, sweep
from ffcv_imnet.train import checkpoint
from tests.conftest import SmallData
from tests.faults.lives import Life, Row, open_data, same_run, write_data
from tests.pictures import make_tree

NEVER, ALWAYS = 10**9, 10**9
LIFE = 120.0  # seconds


@dataclass(frozen=True)
class Case:
    """A command that writes below a folder of its own."""

    name: str
    command: Callable[[Path], int | None]
    sound: Callable[[Path], str | None]  # what is wrong in the folder after a failure
    same: Callable[
        [Path, Path], bool
    ]  # whether the second attempt made what an undisturbed one makes
    resumed: Callable[[Path], int | None] | None = None  # that attempt, where it is another command


def life_of(case: Case, place: Path, n: int, count: int, error: int, again: bool = False) -> Life:
    """The command with its n-th request for room refused, and `count - 1` after it."""
    asked = place.with_suffix(".asked")

    def main() -> int | None:
        library = ctypes.CDLL(None)
        library.fault_arm(f"{place}/".encode(), ctypes.c_long(n), ctypes.c_long(count), error)
        try:
            return (case.resumed if again and case.resumed else case.command)(place)
        finally:
            asked.write_text(str(library.fault_count()))

    return Life(main, place.with_suffix(".txt"))


def tried(case: Case, folder: Path, first: int, limit: int | None) -> list[Row]:
    """A row for a disk that stays full and one for a single refusal."""
    whole = folder / f"{case.name}_whole"
    whole.mkdir()
    if life_of(case, whole, NEVER, 0, 0).end(LIFE) != 0:
        raise RuntimeError(f"undisturbed, {case.name} fails: {whole}.txt")
    requests = int(whole.with_suffix(".asked").read_text())
    rows = []
    for what, count, error in (
        ("full from there on (ENOSPC)", ALWAYS, errno.ENOSPC),
        ("that one alone (EIO)", 1, errno.EIO),
    ):
        outcomes: Counter[str] = Counter()
        faults = []
        for n in range(requests)[first:limit]:
            place = folder / f"{case.name}_{error}_{n}"
            place.mkdir()
            life = life_of(case, place, n, count, error)
            status, said = life.end(LIFE), life.said()
            outcomes[f"status {status}"] += 1
            fault = fault_of(case, place, status, said)
            again = life_of(case, place, NEVER, 0, 0, again=True)
            if fault is None and again.end(LIFE) != 0:
                fault = f"then: {again.error()}"
            if fault is None and not case.same(place, whole):
                fault = "then another result"
            if fault is not None:
                faults.append(f"n={n}: {fault}")
                print(f"  {case.name} {what} {faults[-1]} | {life.error()}", file=sys.stderr)
            else:
                print(
                    f"  {case.name} {what} n={n}: {status} {life.error()[-170:]}", file=sys.stderr
                )
                shutil.rmtree(place)
        happened = ", ".join(f"{number} x {name}" for name, number in sorted(outcomes.items()))
        happened = "; ".join([happened, *faults[:3]])
        injected = f"{case.name}, {requests} requests for room, {what}"
        rows.append(Row("writes", injected, happened, "nothing" if not faults else "?", not faults))
    return rows


def fault_of(case: Case, place: Path, status: int | None, said: str) -> str | None:
    """What was not as it should be after a failure."""
    if status not in (0, 1, 2):
        return f"status {status}"
    if "Traceback" in said or said.count("error: ") != (status != 0):
        return "not one sentence"
    waits = place / "out/train.json.partial"  # by a new .beton: the next call gives it its name
    allowed = [waits] if (place / "out/train.beton").exists() else []
    if left := [path.name for path in place.rglob("*.partial") if path not in allowed]:
        return f"left {left}"
    return case.sound(place)


# ---- the commands -------------------------------------------------------------------------------


def checksums(folder: Path) -> dict[str, str]:
    """Of all files below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_case(images: Path) -> Case:
    """write_ffcv.py."""

    def command(place: Path) -> int | None:
        words = f"--split train --data_dir {images} --out_dir {place}/out --num_workers 1"
        return write_ffcv.main(words.split())

    def sound(place: Path) -> str | None:
        path = place / "out/train.beton"
        manifest = beton.manifest_path(path)
        if path.exists() and manifest.exists():
            beton.check_beton(path)
        return "a manifest alone" if manifest.exists() and not path.exists() else None

    def same(place: Path, whole: Path) -> bool:
        return (place / "out/train.beton").read_bytes() == (whole / "out/train.beton").read_bytes()

    return Case("write_ffcv", command, sound, same)


def train_case(data: SmallData) -> Case:
    """Training, two epochs of seven steps with a checkpoint in each."""

    def start(place: Path, *more: str) -> int | None:
        settings = data.settings(place / "run", training__ema_decay=0.9)
        config = place.with_suffix(".yaml")
        config.write_text(to_yaml(settings))
        sys.argv = ["train_imagenet.py", "--config", str(config), *more]
        return train_imagenet.main()

    def sound(place: Path) -> str | None:
        run = place / "run"
        for name in ("last.pt", "previous.pt", "best.pt"):
            if (run / name).exists():
                checkpoint.load(run / name)
        if (run / "log.jsonl").exists():
            read_log(run)
        return None

    return Case(
        "train",
        start,
        sound,
        lambda place, whole: same_run(place / "run", whole / "run"),
        lambda place: start(place, "--resume", "auto"),
    )


def report_case(run: Path) -> Case:
    """A page with its charts as PNGs."""

    def command(place: Path) -> int | None:
        return report.main(
            [str(run), "--out", f"{place}/r.html", "--png", f"{place}/png", "--images", "0"]
        )

    def sound(place: Path) -> str | None:
        page = place / "r.html"
        if page.exists() and not page.read_text().rstrip().endswith("</html>"):
            return "half a page"
        return None

    return Case("report", command, sound, lambda a, b: checksums(a).keys() == checksums(b).keys())


def export_case(run: Path) -> Case:
    """An ONNX file, its weights and labels."""

    def command(place: Path) -> int | None:
        words = ["--weights", str(run / "best.pt"), "--out", f"{place}/m.onnx", "--images", "2"]
        return export.main(words)

    def sound(place: Path) -> str | None:
        return next((f"{p.name} is empty" for p in place.iterdir() if not p.stat().st_size), None)

    def same(place: Path, whole: Path) -> bool:
        ours, theirs = checksums(place), checksums(whole)
        ours.pop("m.safetensors", None)  # its notes stand in any order
        return ours.items() < theirs.items() and (place / "m.safetensors").exists()

    return Case("export", command, sound, same)


def sweep_case(run: Path) -> Case:
    """Its own file; the runs that it starts are training's."""

    def command(place: Path) -> int | None:
        out = place / "out"
        config = place.with_suffix(".yaml")
        config.write_text(
            json.dumps({"config": str(run / "config.yaml"), "variants": {"base": {}}})
        )

        def train(one: sweep.Run) -> None:
            one.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "log.jsonl", one.folder)

        # The log is another run's.
        with patch.object(sweep, "train", train), patch.object(sweep, "differences", lambda *_: ""):
            return sweep.main([str(config), "--out", str(out)])

    def sound(place: Path) -> str | None:
        table = place / "out/table.txt"
        return "an empty table" if table.exists() and not table.read_text() else None

    return Case("sweep", command, sound, lambda a, b: checksums(a) == checksums(b))


# ---- the command line ---------------------------------------------------------------------------


def preload(folder: Path) -> None:
    """Start this process anew with the library in it."""
    library = folder / "nth_write.so"
    source = Path(__file__).with_name("nth_write.c")
    words = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(words, check=True)
    words = [sys.executable, "-m", "tests.faults.writes", *sys.argv[1:]]
    os.execve(sys.executable, words, os.environ | {"LD_PRELOAD": str(library)})


def main() -> int:
    """Exit status 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--dir", type=Path, help="kept; default: a temporary folder")
    parser.add_argument(
        "--only", nargs="*", help="some of write_ffcv, train, report, export, sweep"
    )
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out N requests")
    parser.add_argument("--most", type=int, metavar="N", help="the first N requests of each alone")
    given = parser.parse_args()
    folder = (given.dir or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if "nth_write" not in os.environ.get("LD_PRELOAD", ""):
        preload(folder)
    data = open_data(folder / "data") if (folder / "data").exists() else write_data(folder / "data")
    torch.set_num_threads(1)
    run = folder / "run/run"
    if not run.exists():
        run.parent.mkdir()
        life = Life(lambda: train_case(data).command(run.parent), folder / "run.txt")
        if life.end() != 0:
            raise RuntimeError(life.error())
    images = (
        make_tree(folder / "images", (3, 2))
        if not (folder / "images").exists()
        else folder / "images"
    )
    cases = [
        report_case(run),
        export_case(run),
        train_case(data),
        write_case(images),
        sweep_case(run),
    ]
    rows: list[Row] = []
    for case in cases:
        if case.name in (given.only or [one.name for one in cases]):
            for row in tried(case, Path(tempfile.mkdtemp(dir=folder)), given.first, given.most):
                rows.append(row)
                print(json.dumps(asdict(row)), flush=True)
    return int(not all(row.well for row in rows))


if __name__ == "__main__":
    sys.exit(main())

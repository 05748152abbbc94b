"""`write_ffcv.py` from the command line to the file, and what it does when things go wrong."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import spawn
from pathlib import Path

import numpy as np
import pytest

import write_ffcv
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.images import forecast
from ffcv_imnet.images.encode import PixelSettings, encode_all
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.pixels import decode_rgb, is_partly_lost
from ffcv_imnet.images.stored import RAW
from ffcv_imnet.tools import verify
from tests.pictures import Deadly, make_slow_tree, make_tree, picture, save
from tests.test_atomic import largest_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 images in three classes; not to be changed."""
    return make_tree(tmp_path_factory.mktemp("tree"))


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    start = ["--split", "train", "--data_dir", str(data), "--out_dir", str(out)]
    return [*start, *([] if "--num_workers" in more else ["--num_workers", "1"]), *more]


def write(data: Path, out: Path, *more: str) -> beton.Manifest:
    assert write_ffcv.main(arguments(data, out, *more)) == 0
    return beton.verify_beton(out / "train.beton")


def contents(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ------------------------------------------------------------------------------- what is written


def test_file_holds_the_images_in_order(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write(tree, tmp_path)
    assert contents(tmp_path) == ["train.beton", "train.json"]
    assert manifest.samples == 15 and manifest.class_counts == (5, 4, 6)
    assert manifest.classes == ("n00000000", "n00000001", "n00000002")
    assert manifest.bytes == (tmp_path / "train.beton").stat().st_size
    assert manifest.content_checksum == beton.content_checksum(tmp_path / "train.beton")
    source = ImageFolderTree(tree / "train")
    tables = beton.read_tables(tmp_path / "train.beton")
    assert np.array_equal(tables.labels, source.labels)
    data = (tmp_path / "train.beton").read_bytes()
    for index, (start, size) in enumerate(zip(tables.pointers, tables.sizes, strict=True)):
        pixels = decode_rgb(data[int(start) : int(start + size)])
        assert np.abs(pixels.astype(int) - decode_rgb(source.read(index)[0])).mean() < 2.5
    said = capsys.readouterr().out
    assert "15 images of 3 classes" in said and "free in" in said and "images/s" in said
    assert manifest.content_checksum in said


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    tree = make_tree(tmp_path, (40, 30, 25))  # several chunks
    write(tree, tmp_path / "one", "--compress_probability", "0.5")
    write(tree, tmp_path / "two", "--compress_probability", "0.5", "--num_workers", "2")
    one, two = ((tmp_path / name / "train.beton").read_bytes() for name in ("one", "two"))
    assert one == two
    modes = beton.read_tables(tmp_path / "one" / "train.beton").modes
    assert 20 < (modes == RAW).sum() < 75


def test_options_change_what_is_stored(tree: Path, tmp_path: Path) -> None:
    source = ImageFolderTree(tree / "train")
    sides = np.array([decode_rgb(source.read(i)[0]).shape[:2] for i in range(len(source))])
    for name, options, wanted in [
        ("longest", ["--max_resolution", "32"], lambda s: s.max(axis=1) == 32),
        ("shorter", ["--short_side", "32"], lambda s: s.min(axis=1) == 32),
        ("as it is", ["--max_resolution", "none"], lambda s: (s == sides).all(axis=1)),
        ("default", [], lambda s: (s == sides).all(axis=1)),
    ]:
        write(tree, tmp_path / name, *options)
        tables = beton.read_tables(tmp_path / name / "train.beton")
        assert wanted(np.stack([tables.heights, tables.widths], axis=1)).all(), name


def test_seed_decides_what_is_compressed(tree: Path, tmp_path: Path) -> None:
    options = ["--compress_probability", "0.5", "--seed"]
    first = write(tree, tmp_path / "a", *options, "0")
    assert write(tree, tmp_path / "b", *options, "0").content_checksum == first.content_checksum
    assert write(tree, tmp_path / "c", *options, "1").content_checksum != first.content_checksum


def test_subset_is_even_and_seeded() -> None:
    labels = np.repeat(np.arange(4), [10, 3, 7, 5])
    for count in (4, 5, 6, 7, 11, 12, 15):
        chosen = write_ffcv.even_subset(labels, 4, count, seed=0)
        counts = np.bincount(labels[chosen], minlength=4)
        assert len(set(chosen.tolist())) == count == counts.sum() and np.ptp(counts) <= 1
        assert (np.diff(chosen) > 0).all()
        again = write_ffcv.even_subset(labels, 4, count, seed=0)
        assert np.array_equal(again, chosen)
        assert not np.array_equal(write_ffcv.even_subset(labels, 4, count, seed=1), chosen)
    for count, reason in [(26, "more than the 25"), (16, "at most 15"), (3, "classes empty")]:
        with pytest.raises(UsageError, match=reason):
            write_ffcv.even_subset(labels, 4, count, seed=0)


def test_subset_is_written(tree: Path, tmp_path: Path) -> None:
    manifest = write(tree, tmp_path, "--subset", "7")
    assert manifest.samples == 7 and sorted(manifest.class_counts) == [2, 2, 3]
    with pytest.raises(UsageError, match="--subset 16 is more than the 15 images"):
        write_ffcv.main(arguments(tree, tmp_path / "no", "--subset", "16"))


# --------------------------------------------------------------------------- unreadable images


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """The tree with an empty file, a truncated JPEG and a text file named .jpg in it."""
    root = make_tree(tmp_path / "damaged")
    first = ImageFolderTree(root / "train")
    (root / "train" / first.name(1)).write_bytes(b"")
    cut = root / "train" / first.name(9)
    cut.write_bytes(cut.read_bytes()[:600])
    (root / "train" / "n00000002" / "zz.jpg").write_text("404 not found")
    return root


def test_all_unreadable_images_are_listed(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="3 of 16 images are unreadable") as caught:
        write_ffcv.main(arguments(damaged, tmp_path / "out"))
    assert caught.value.status == 1
    assert contents(tmp_path / "out") == ["train.unreadable.txt"]
    listed = [line for line in capsys.readouterr().err.splitlines() if "unreadable:" in line]
    kept = (tmp_path / "out" / "train.unreadable.txt").read_text().splitlines()
    assert [f"unreadable: {line}" for line in kept] == listed
    names = ["n00000000/n00000000_0001.JPEG", "n00000002/n00000002_0009.JPEG", "n00000002/zz.jpg"]
    reasons = ["empty", "truncated", "not an image"]
    for line, name, reason in zip(listed, names, reasons, strict=True):
        assert f"train/{name}: " in line and reason in line.lower()


def test_of_many_unreadable_images_three_are_named_and_all_listed(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [damaged / "train" / "n00000001" / f"z{n}.jpg" for n in range(4)]
    for path in more:
        path.touch()
    with pytest.raises(RunError, match=r"7 of 20 .*\(listed in .*unreadable\.txt\)"):
        write_ffcv.main(arguments(damaged, tmp_path / "out"))
    assert capsys.readouterr().err.count("unreadable: ") == 3
    assert contents(tmp_path / "out") == ["train.unreadable.txt"]
    assert len((tmp_path / "out" / "train.unreadable.txt").read_text().splitlines()) == 7
    write(damaged, tmp_path / "out", "--skip_bad")
    assert "and 4 more; all are named in the manifest" in capsys.readouterr().err
    assert contents(tmp_path / "out") == ["train.beton", "train.json"]


def test_skip_bad_goes_on_without_them(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = write(damaged, out, "--skip_bad", "--compress_probability", "0.5")
    assert manifest.samples == 13 and manifest.class_counts == (4, 4, 5)
    assert [entry["path"] for entry in manifest.skipped] == [
        "n00000000/n00000000_0001.JPEG",
        "n00000002/n00000002_0009.JPEG",
        "n00000002/zz.jpg",
    ]
    assert manifest.skipped[0]["reason"] == "the file is empty"
    assert write_ffcv.main(arguments(damaged, out, "--skip_bad", "--compress_probability=0.5")) == 0
    with pytest.raises(UsageError, match="lacks 3 unreadable images"):
        write_ffcv.main(arguments(damaged, out, "--compress_probability", "0.5"))


def test_class_without_readable_images(tmp_path: Path) -> None:
    root = make_tree(tmp_path, (2, 1))
    (root / "train" / "n00000001" / "n00000001_0002.JPEG").write_bytes(b"")
    with pytest.raises(RunError, match="no image of class n00000001 is readable"):
        write_ffcv.main(arguments(root, tmp_path / "out", "--skip_bad"))
    assert contents(tmp_path / "out") == []


# --------------------------------------------------------------------------- a file is there


def test_up_to_date_is_left_and_else_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, out = make_tree(tmp_path), tmp_path / "out"
    write(tree, out)
    before = (out / "train.beton").stat().st_mtime_ns
    assert write_ffcv.main(arguments(tree, out)) == 0
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(
        UsageError,
        match=r"--jpeg_quality 90, and this command has --jpeg_quality 80; --force replaces it",
    ):
        write_ffcv.main(arguments(tree, out, "--jpeg_quality", "80"))
    os.utime(tree / "train" / "n00000000" / "n00000000_0000.JPEG", (1, 1))
    with pytest.raises(UsageError, match="source images have changed, or were copied"):
        write_ffcv.main(arguments(tree, out))
    assert (out / "train.beton").stat().st_mtime_ns == before
    manifest = write(tree, out, "--force", "--jpeg_quality", "80")
    assert manifest.settings["jpeg_quality"] == 80
    os.truncate(out / "train.beton", 1000)
    with pytest.raises(UsageError, match=r"truncated.*--force"):
        write_ffcv.main(arguments(tree, out, "--jpeg_quality", "80"))


def test_a_file_of_another_program_is_said_to_be_one(tree: Path, tmp_path: Path) -> None:
    replace(write(tree, tmp_path), settings={}).save(tmp_path / "train.json")  # as `adopt` does
    with pytest.raises(UsageError, match=r"differs: another program wrote it; --force"):
        write_ffcv.main(arguments(tree, tmp_path))


def test_stop_between_the_renames_is_repaired(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rename = Path.replace

    def stopped(self: Path, target: Path) -> Path:
        if self.name == "train.json.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write(tree, tmp_path)
    assert contents(tmp_path) == ["train.beton", "train.json.partial"]
    monkeypatch.undo()
    assert write_ffcv.main(arguments(tree, tmp_path)) == 0
    assert "stopped before its manifest was in place" in capsys.readouterr().out
    beton.verify_beton(tmp_path / "train.beton")


# -------------------------------------------------------------------------------- interruptions


def test_killed_worker_ends_with_an_error(tree: Path) -> None:
    chunks = encode_all(Deadly(tree / "train"), PixelSettings(), beton.PAGE_SIZE, 1)
    with pytest.raises(RunError, match=r"worker process died.*--num_workers"):
        list(chunks)
    assert not multiprocessing.active_children()


def test_workers_that_cannot_start(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by an account that may not read the Python that they are started with, say."""
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/false")
    chunks = encode_all(ImageFolderTree(tree / "train"), PixelSettings(), beton.PAGE_SIZE, 1)
    with pytest.raises(
        RunError, match=r"worker process died.* does /bin/false not start for this user"
    ):
        list(chunks)
    assert not multiprocessing.active_children()
    monkeypatch.setattr(spawn, "_python_exe", b"/etc/passwd")  # none that anybody may start
    chunks = encode_all(ImageFolderTree(tree / "train"), PixelSettings(), beton.PAGE_SIZE, 1)
    with pytest.raises(RunError, match="this user may not start /etc/passwd"):
        list(chunks)


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Arguments of a run that takes seconds and whose partial file grows at once."""
    monkeypatch.setattr(forecast, "ESTIMATE_FROM", 1)
    tree = make_slow_tree(tmp_path)
    yield arguments(tree, tmp_path / "out", "--compress_probability", "0")


def wait_until_it_writes(out: Path) -> None:
    partial = out / "train.beton.partial"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if partial.exists() and partial.stat().st_size > beton.PAGE_SIZE:
            return
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_interrupted_run_leaves_nothing(
    number: signal.Signals, error: type[BaseException], slow: list[str], tmp_path: Path
) -> None:
    def interrupt() -> None:
        wait_until_it_writes(tmp_path / "out")
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(error) as caught:
        write_ffcv.main(slow)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 143
    assert contents(tmp_path / "out") == []
    assert not multiprocessing.active_children()


def test_sigkill_leaves_no_final_name_and_no_process(slow: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "write_ffcv.py", *slow]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until_it_writes(out)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert workers and contents(out) == ["train.beton.partial"]
    deadline = time.monotonic() + 10
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)
    shutil.rmtree(tmp_path / "train")
    write(make_tree(tmp_path), out)
    assert contents(out) == ["train.beton", "train.json"]


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_full_disk(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UsageError, match=r"will not fit into the 1 kB free"):
            write_ffcv.main(arguments(tree, tmp_path))

    with (
        largest_file(100_000),
        pytest.raises(RunError, match=r"train\.beton could not be written \(File too large\)"),
    ):
        write_ffcv.main(arguments(tree, tmp_path))
    assert contents(tmp_path) == []


def test_two_writers_of_one_file(tree: Path, tmp_path: Path) -> None:
    with (
        beton.partial_file(tmp_path / "train.beton"),
        pytest.raises(UsageError, match=r"another write_ffcv\.py is writing"),
    ):
        write_ffcv.main(arguments(tree, tmp_path))


def test_small_memory_is_told(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_ffcv, "available_memory", lambda: 1_000_000)
    write(tree, tmp_path)
    assert "at 1,000 images/s training would read" in capsys.readouterr().out
    monkeypatch.undo()
    assert (write_ffcv.available_memory() or 1) > 0


# --------------------------------------------------------------------------------- command line

MISTAKES = {
    "--splt=train": r"unknown option --splt \(did you mean --split\?\)",
    "--split train --max_res 300": r"unknown option --max_res",
    "--split trian": r"'trian' is neither train nor val \(did you mean train\?\)",
    "": "--split train or --split val is missing",
    "--split": "--split: expected one argument",
    "--split train more": "'more' is not an option",
    "--split train --max_resolution 300 --short_side 256": "exclude each other",
    "--split train --max_resolution -3": "'-3' is not a whole number of at least 8|expected one",
    "--split train --jpeg_quality 101": "'101' is not a whole number from 1 to 100",
    "--split train --compress_probability nan": "'nan' is not a number from 0 to 1",
    "--split train --num_workers 0": "'0' is not a whole number of at least 1",
    "--split train --num_workers 100000": "more than the .* cores",
    "--split train --subset 1.5": "'1.5' is not a whole number",
    "--split train --tar t.tar --data_dir d": "--data_dir and --tar exclude each other",
    "--split train --data_dir nowhere": "nowhere does not exist: expected nowhere/train/<class",
    "--split val": "has no folder 'val'",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, tree: Path, tmp_path: Path) -> None:
    where = [] if "--data_dir" in mistake else ["--data_dir", str(tree)]
    with pytest.raises(UsageError, match=MISTAKES[mistake]) as caught:
        write_ffcv.main([*mistake.split(), *where, "--out_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_out_dir_that_cannot_be(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"could not be written: its folder is a file"):
        write_ffcv.main(arguments(tree, tmp_path / "file" / "out"))


def test_out_dir_where_it_would_be_taken_for_a_class(tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "images")
    (tmp_path / "link").symlink_to(root / "train")
    for out in (root / "train" / "beton", tmp_path / "link" / "n00000000" / "beton"):
        with pytest.raises(
            UsageError, match=rf"^--out_dir {out} is inside {root}/train, whose folders are read as"
        ):
            write_ffcv.main(arguments(root, out))
        assert not out.exists()
    for _ in range(2):  # beside the folder of the split it is no class, and stays none
        assert write_ffcv.main(arguments(root, root / "beton")) == 0
    table = tmp_path / "labels.csv"  # says the class of each image, wherever it lies
    files = sorted((root / "train").glob("*/*"))
    table.write_text("file,class\n" + "".join(f"{f.name},{f.parent.name}\n" for f in files))
    inside = arguments(root, root / "train" / "mine")
    assert write_ffcv.main([*inside, "--labels", str(table), "--allow_odd"]) == 0


def test_exit_status_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "write_ffcv.py", "--split", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_manifest_is_plain_json(tree: Path, tmp_path: Path) -> None:
    write(tree, tmp_path)
    said = json.loads((tmp_path / "train.json").read_text())
    assert said["classes"][0] == "n00000000" and said["settings"]["max_resolution"] == 400
    assert set(said["versions"]) == {"ffcv", "opencv", "pillow", "numpy", "python"}
    assert "/" not in json.dumps(said["source"])


def test_bad_names_in_files_are_no_obstacle(tmp_path: Path) -> None:
    root = make_tree(tmp_path, (2, 1))
    save(root / "train" / "n00000000" / os.fsdecode(b"\xff odd, \xc3\xbc.jpg"), picture(0))
    assert write(root, tmp_path / "out").samples == 4


def test_jpegs_that_are_lost_in_part_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow reads what ends early, if it ends with the marker of an end, and fills the rest with gray."""
    tree = make_tree(tmp_path / "images", (2, 2))
    whole = next((tree / "train").rglob("*.JPEG"))
    save(whole, picture(7, 200, 300))
    sound = whole.read_bytes()
    assert not is_partly_lost(sound) and not is_partly_lost(sound + b"trailing")
    whole.write_bytes(sound[: len(sound) // 3] + b"\xff\xd9")
    assert is_partly_lost(whole.read_bytes())
    words = [
        "--split",
        "train",
        "--data_dir",
        str(tree),
        "--out_dir",
        str(tmp_path),
        "--num_workers",
        "1",
    ]
    assert write_ffcv.main(words) == 0
    assert f"and stored so: 1 image, for instance {whole.parent.name}" in capsys.readouterr().out
    assert verify.main([str(tree / "train"), "--num_workers", "1"]) == 0
    assert "is damaged in part" in capsys.readouterr().out

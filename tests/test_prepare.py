"""`prepare`: the tree that the archives hold, after any interruption."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.images.tar import TarArchive
from ffcv_imnet.tools import prepare
from tests.archives import member, pack_train, pack_val, tar_of
from tests.pictures import make_tree

ROOT = Path(__file__).parents[1]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """tree/, and the same as train.tar, val.tar and labels.txt."""
    make_tree(tmp_path / "tree")
    make_tree(tmp_path / "tree", (3, 2, 4), split="val")
    pack_train(tmp_path / "tree", tmp_path / "train.tar")
    pack_val(tmp_path / "tree", tmp_path / "val.tar", tmp_path / "labels.txt")
    return tmp_path


def arguments(packed: Path) -> list[str]:
    words = ["--train_tar", "train.tar", "--val_tar", "val.tar", "--val_labels", "labels.txt"]
    words = [str(packed / word) if "." in word else word for word in words]
    return [*words, "--out_dir", str(packed / "out")]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_tree_is_unpacked(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(arguments(packed)) == 0
    assert contents(packed / "out") == contents(packed / "tree")
    assert names(packed / "out") == ["train", "val"]
    said = capsys.readouterr().out
    assert "train/n00000002 6" in said and "val: 9 images of 3 classes" in said


def test_stopped_anywhere_it_goes_on(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = prepare.write_file
    for after in (0, 3, 11, 18):
        count = 0

        def stopped(path: Path, data: bytes, after: int = after) -> None:
            nonlocal count
            if count == after:
                raise KeyboardInterrupt
            count += 1
            write(path, data)

        monkeypatch.setattr(prepare, "write_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare.main(arguments(packed))
        whole = contents(packed / "tree")
        for folder in (packed / "out").glob("*/n*"):  # a class is there whole or not at all
            name = str(folder.relative_to(packed / "out"))
            assert len(names(folder)) == sum(path.startswith(name) for path in whole)
        shutil.rmtree(packed / "out")
    monkeypatch.setattr(prepare, "write_file", write)
    assert prepare.main(arguments(packed)) == 0
    kept = (packed / "out/train/n00000000").stat().st_ino
    (packed / "out/train/n00000001/n00000001_0006.JPEG").write_bytes(b"")  # a power cut
    shutil.rmtree(packed / "out/val/n00000002")
    assert prepare.main(arguments(packed)) == 0
    assert contents(packed / "out") == contents(packed / "tree")
    assert (packed / "out/train/n00000000").stat().st_ino == kept


def test_sigkill(packed: Path) -> None:
    big = tar_of(*(member(f"{i:04}.jpg", bytes(20000)) for i in range(3000)))
    (packed / "train.tar").write_bytes(tar_of(*(member(f"n{i}.tar", big) for i in range(3))))
    words = ["--train_tar", str(packed / "train.tar"), "--out_dir", str(packed / "out")]
    command = [sys.executable, "-m", "ffcv_imnet", "prepare", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (packed / "out/train/n0").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(len(names(f)) == 3000 for f in (packed / "out/train").iterdir())
    assert prepare.main(words) == 0
    assert {f.name: len(names(f)) for f in (packed / "out/train").iterdir()} == {
        f"n{i}": 3000 for i in range(3)
    }
    assert names(packed / "out") == ["train"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_truncated_archive_keeps_its_whole_classes(split: str, packed: Path) -> None:
    whole = packed / f"{split}.tar"
    data = whole.read_bytes()
    archive = TarArchive(packed / "train.tar")
    place = int(archive.offsets[2]) if split == "train" else len(data) // 2
    whole.write_bytes(data[: place + 700])
    with pytest.raises(RunError, match=r"is truncated or damaged: .*; good are"):
        prepare.main(arguments(packed))
    have = contents(packed / "out")
    assert {k: v for k, v in contents(packed / "tree").items() if k in have} == have
    whole.write_bytes(data)
    assert prepare.main(arguments(packed)) == 0
    assert contents(packed / "out") == contents(packed / "tree")


def test_hostile_archive_writes_nothing(packed: Path) -> None:
    (packed / "train.tar").write_bytes(
        tar_of(member("n0.tar", tar_of(member("../../x.jpg", b"1"))))
    )
    before = contents(packed)
    with pytest.raises(RunError, match=r"'../../x.jpg' has '..' in its path: refused"):
        prepare.main(arguments(packed))
    assert contents(packed) == before


def test_tars_are_deleted_only_when_all_files_are_theirs(packed: Path) -> None:
    assert prepare.main(arguments(packed)) == 0
    file = packed / "out/train/n00000001/n00000001_0006.JPEG"
    right = file.read_bytes()
    file.write_bytes(right[:-1] + b"?")
    with pytest.raises(RunError, match=r"n00000001_0006.JPEG is not what .* the tars were kept"):
        prepare.main([*arguments(packed), "--delete_tars"])
    assert (packed / "train.tar").exists() and (packed / "val.tar").exists()
    file.write_bytes(right)
    assert prepare.main([*arguments(packed), "--delete_tars"]) == 0
    assert names(packed) == ["labels.txt", "out", "tree"]


def test_what_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ["--train_tar", str(packed / "train.tar"), "--out_dir", str(packed / "out")]
    for words, reason in [
        ([], "nothing to unpack"),
        (["--val_tar", "x"], "needs --val_labels"),
        ([*train, "--val_labels", "x"], "goes with --val_tar"),
        (["--train_tar", "none.tar"], "none.tar cannot be read"),
    ]:
        with pytest.raises(UsageError, match=reason):
            prepare.main(words)
    assert prepare.main(train) == 0
    with prepare.lock(packed / "out"), pytest.raises(UsageError, match="another prepare"):
        prepare.main(train)
    (packed / "out/train/n00000001/mine.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds 'mine.jpg', which is not in"):
        prepare.main(train)
    shutil.rmtree(packed / "out")
    disk = os.statvfs(packed)
    small = os.statvfs_result([*disk[:4], 1, *disk[5:]])
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    with pytest.raises(UsageError, match="will not fit into"):
        prepare.main(train)

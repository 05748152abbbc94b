"""`verify`: what is well passes, everything else is named."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import write_ffcv
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.tools import verify
from tests.archives import pack_train, pack_val
from tests.pictures import make_tree, picture, save


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A tree of two splits in tmp_path/tree."""
    make_tree(tmp_path / "tree")
    return make_tree(tmp_path / "tree", (2, 2, 2), split="val").parent


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = verify.main([*map(str, words), "--num_workers", "1"])
    said = capsys.readouterr().out
    summary = json.loads(said.splitlines()[-1])
    page = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    assert all(
        f"`{name}`" in page for name in [*summary, *{k for p in summary["problems"] for k in p}]
    )
    assert summary["well"] == (status == 0) == (summary["findings"]["BAD"] == 0)
    return status, said


def write(data: Path, split: str, *more: str) -> Path:
    words = ["--split", split, "--data_dir", str(data / "tree"), "--out_dir", str(data / "out")]
    assert write_ffcv.main([*words, "--num_workers", "1", *more]) == 0
    return data / "out" / f"{split}.beton"


def test_whole_tree(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run(capsys, data / "tree")
    assert status == 0 and "15 images of 3 classes, 4 to 6 each" in said
    assert "all 15 images decode" in said and "the same 3 classes in the same order" in said
    assert not list(data.rglob("*.verify.json"))


@pytest.mark.parametrize(("inside", "path"), [("train", "."), ("train/n00000001", "..")])
def test_the_current_folder(
    inside: str, path: str, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """It, and not the folder around it, whose classes its name would be."""
    monkeypatch.chdir(data / "tree" / inside)
    cut = data / "tree/train/n00000001/n00000001_0006.JPEG"
    os.truncate(cut, 500)
    status, said = run(capsys, path)
    assert status == 1 and "n00000001_0006" in said
    assert "of 3 classes" in said


def test_what_is_wrong_with_a_tree(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = data / "tree/train", data / "tree/val"
    cut = train / "n00000001/n00000001_0006.JPEG"
    os.truncate(cut, 500)
    save(train / "n00000000/x.png", picture(0))
    (train / "n00000000/x.png").rename(train / "n00000000/n02105855_2933.JPEG")
    (val / "n00000002").rename(val / "n00000003")
    status, said = run(capsys, data / "tree")
    assert status == 1
    assert "BAD  " in said and "n00000001_0006.JPEG: does not decode: " in said
    assert "odd  " in said and "n02105855_2933.JPEG: is a PNG, as expected in ImageNet" in said
    assert "2 classes are not in" in said
    (val / "n00000003").rename(val / "n00000002")
    (val / "n00000009").mkdir()
    status, said = run(capsys, val)
    assert status == 0 and "classes have no image, for instance n00000009" in said


def test_archives(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = pack_train(data / "tree", data / "ILSVRC2012_img_train.tar")
    val = pack_val(data / "tree", data / "ILSVRC2012_img_val.tar", data / "labels")
    labels = ("--val_labels", data / "labels")
    assert run(capsys, train, val, *labels)[0] == 0
    status, said = run(capsys, train, "--md5", "--no_decode")
    assert status == 1 and "the official archive's is 1d675b47d978889d74fa0da5fadfb00e" in said
    status, said = run(capsys, val, *labels, "--imagenet")
    assert status == 1 and "ImageNet has 1,000 classes; ImageNet has 50,000 val images" in said
    os.truncate(train, 20000)
    status, said = run(capsys, train)
    assert status == 1 and "is truncated or damaged" in said


def test_imagenets_numbers_are_demanded_of_what_looks_like_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = verify.Report()
    classes = [f"n{number:08d}" for number in range(1000)]
    target = verify.Target("tree", Path("val"), "val")
    verify.check_counts(target, classes, np.full(1000, 50), False, report)
    assert report.bad == 0
    verify.check_counts(target, classes, np.full(1000, 49), False, report)
    assert report.bad == 1
    verify.check_counts(target, classes[:950], np.full(950, 50), False, report)
    assert report.bad == 2
    assert len(verify.CMYK) == 23


def test_interrupted_check_goes_on(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(data / "tree", (40, 30, 20))
    train = data / "tree/train"
    os.truncate(train / "n00000000/n00000000_0001.JPEG", 300)
    update = verify.Progress.update

    def stopped(self: verify.Progress, count: int, note: str = "") -> None:
        update(self, count, note)
        if self.done >= 32:
            raise KeyboardInterrupt

    monkeypatch.setattr(verify.Progress, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        verify.main([str(train), "--num_workers", "1"])
    monkeypatch.undo()
    capsys.readouterr()
    status, said = run(capsys, train)
    assert status == 1 and "32 images were checked by an interrupted run" in said
    assert said.count("does not decode") == 2  # the finding and the summary
    assert not list(data.rglob("*.verify.json"))


def test_beton(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(data, "train", "--compress_probability", "0.5")
    write(data, "val", "--subset", "4")
    status, said = run(capsys, data / "out", "--data_dir", data / "tree")
    assert status == 0 and "15 of 15 samples equal" in said and "4 of 4 samples equal" in said
    source = ImageFolderTree(data / "tree/train")
    save(data / "tree/train" / source.name(3), picture(99, 43, 57))
    status, said = run(capsys, train, "--data_dir", data / "tree")
    assert status == 1 and f"sample 3 does not show {source.name(3)}" in said
    assert re.search(r"^BAD .*14 of 15 samples equal", said, re.M)
    place = int(beton.read_tables(train).pointers[4]) + 300
    with train.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    status, said = run(capsys, train)
    assert status == 1 and "stored bytes are not those in its manifest" in said
    os.truncate(train, 1000)
    status, said = run(capsys, train)
    assert status == 1 and "truncated" in said


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    for words, reason in [
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path / "x.txt")], "neither a .tar, a .beton nor a .parquet"),
        ([str(tmp_path), "--tar", "t.tar", "--data_dir", "d"], "exclude each other"),
    ]:
        with pytest.raises(UsageError, match=reason):
            verify.main(words)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_an_avif_is_as_good_as_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        folder = tmp_path / "train" / "ab"[number]
        folder.mkdir(parents=True)
        Image.fromarray(picture(number, 20, 24)).save(folder / "x.avif")
    assert verify.main([str(tmp_path / "train"), "--num_workers", "1"]) == 0
    assert "does not decode" not in capsys.readouterr().out

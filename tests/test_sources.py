"""Every way in gives the same images in the same order; what lies otherwise is refused."""

import os
from pathlib import Path

import numpy as np
import pytest

import write_ffcv
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.images import ImageSource
from ffcv_imnet.images.flat import FlatFolder
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.sources import open_source, reading_order
from tests.archives import member, pack_train, pack_val, tar_of
from tests.kill_runs import make_kaggle
from tests.pictures import make_tree


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """tree/, the same as tars, and as Kaggle's layout; a folder for what the test writes."""
    make_tree(tmp_path / "tree")
    make_tree(tmp_path / "tree", (3, 2, 4), split="val")
    pack_train(tmp_path / "tree", tmp_path / "train.tar")
    pack_val(tmp_path / "tree", tmp_path / "val.tar", tmp_path / "labels.txt")
    lines = [line.split() for line in (tmp_path / "labels.txt").read_text().splitlines()]
    rows = "".join(f"{Path(name).stem},{wnid} 1 2 3 4 \n" for name, wnid in lines)
    (tmp_path / "solution.csv").write_text("ImageId,PredictionString\n" + rows)
    make_kaggle(tmp_path / "tree", tmp_path / "solution.csv", tmp_path / "kaggle")
    return tmp_path


def same(source: ImageSource, tree: ImageFolderTree) -> bool:
    return (
        tuple(source.classes) == tree.classes
        and np.array_equal(source.labels, tree.labels)
        and all(source.read(index) == tree.read(index) for index in range(len(tree)))
    )


@pytest.mark.parametrize(
    "inside", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"], ids=["root", "ILSVRC", "CLS-LOC"]
)
def test_kaggles_layout_is_found_from_any_of_its_folders(inside: str, data: Path) -> None:
    root = data / "kaggle" / inside
    if inside == "ILSVRC":  # what lies in data_dir/ILSVRC must be told apart from a tree
        assert (root / "Data").is_dir()
    for split in ("train", "val"):
        assert same(open_source(split, [root]), ImageFolderTree(data / "tree" / split))


def test_kaggles_layout_is_found_where_one_stands(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for inside in ("kaggle", "kaggle/ILSVRC/Data/CLS-LOC"):
        monkeypatch.chdir(data / inside)
        assert same(open_source("val", [Path()]), ImageFolderTree(data / "tree/val"))


def test_flat_validation_images(data: Path) -> None:
    root = data / "kaggle"
    flat = root / "ILSVRC/Data/CLS-LOC/val"
    solution = root / "LOC_val_solution.csv"
    held = solution.rename(data / "elsewhere.csv")
    with pytest.raises(UsageError, match=r"no LOC_val_solution\.csv lies near.*--labels"):
        open_source("val", [root])
    tree = ImageFolderTree(data / "tree/val")
    assert same(open_source("val", [root], labels=held), tree)
    assert same(open_source("val", [root], labels=data / "labels.txt"), tree)
    source = open_source("val", [root], labels=held)
    assert source.kind == "flat folder" and source.ignored == 0
    (flat / "notes.txt").write_text("")
    assert open_source("val", [root], labels=held).ignored == 1
    before = source.fingerprint()
    held.write_text(held.read_text().replace(",n00000000", ",n00000009"))
    assert open_source("val", [root], labels=held).fingerprint() != before
    (flat / "new.JPEG").write_bytes(b"")
    with pytest.raises(RunError, match=r"1 of the 10 images of .* have no label, for instance new"):
        open_source("val", [root], labels=held)
    for path in flat.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="holds no images"):
        FlatFolder(flat, {})
    with pytest.raises(UsageError, match="does not exist"):
        FlatFolder(flat / "none", {})


def test_a_tree_that_is_no_kaggle(data: Path) -> None:
    assert same(open_source("val", [data / "tree"]), ImageFolderTree(data / "tree/val"))
    assert np.array_equal(reading_order(open_source("val", [data / "tree"])), np.arange(9))
    with pytest.raises(UsageError, match="side by side"):
        os.renames(data / "kaggle/ILSVRC/Data/CLS-LOC/val", data / "other/val")
        open_source("val", [data / "other"])


def test_options_that_contradict_each_other(data: Path) -> None:
    for options, reason in [
        ({"tar": data / "t", "parquet": data / "p"}, "exclude each other"),
        ({"parquet": data, "labels": data / "labels.txt"}, "the shards hold labels"),
        ({"tar": data / "val.tar"}, "name their labels with --labels"),
    ]:
        with pytest.raises(UsageError, match=reason):
            open_source("val", [data], **options)


def test_an_archive_of_the_other_split_or_of_folders(data: Path) -> None:
    official = (data / "train.tar").rename(data / "ILSVRC2012_img_train.tar")
    with pytest.raises(UsageError, match="is the archive of train, not of val"):
        open_source("val", [data], tar=official)
    folders = tar_of(*(member(f"train/n{i}/{i}.JPEG", b"1") for i in range(3)))
    (data / "mine.tar").write_bytes(folders)
    with pytest.raises(UsageError, match=r"in folders, for instance train/n0/0\.JPEG: unpack it"):
        open_source("train", [data], tar=data / "mine.tar")


def test_a_folder_too_deep_a_zip_and_a_folder_of_tars(data: Path) -> None:
    (data / "kaggle.zip").write_bytes(b"PK")
    for name in ("file", "link"):
        (data / name).mkdir()
    (data / "file/train").touch()
    (data / "link/train").symlink_to("/not/mounted")
    for place, reason in [
        (data / "tree/train", rf"has no folder 'train'.*did you mean {data}/tree\?"),
        (data / "kaggle.zip", "is a file, not a folder"),
        (data, r"a tar is read with --tar"),
        (data / "none", "does not exist"),
        (data / "file", "file/train is a file, not a folder"),
        (data / "link", "link/train is a link to nothing"),
    ]:
        with pytest.raises(UsageError, match=reason):
            open_source("train", [place])


def test_the_same_images_are_stored_alike(data: Path) -> None:
    labels = ["--labels", str(data / "labels.txt")]
    for split, ways in {
        "train": [["--tar", str(data / "train.tar")], ["--data_dir", str(data / "kaggle")]],
        "val": [["--tar", str(data / "val.tar"), *labels], ["--data_dir", str(data / "kaggle")]],
    }.items():
        found = set()
        for number, way in enumerate([["--data_dir", str(data / "tree")], *ways]):
            out = data / f"out{number}"
            words = ["--split", split, "--out_dir", str(out), "--num_workers", "1"]
            assert write_ffcv.main([*words, *way]) == 0
            found.add(beton.content_checksum(out / f"{split}.beton"))
        assert len(found) == 1

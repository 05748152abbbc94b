"""Parquet shards: the classes and the order of every other way in, or a clear refusal."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import write_ffcv
from ffcv_imnet.core import bounded
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.images import parquet as shards
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.images.parquet import ParquetShards, class_names, is_imagenet, shards_of
from ffcv_imnet.tools import verify
from tests.pictures import make_tree

pyarrow: Any = pytest.importorskip("pyarrow", reason="pyarrow is an optional extra")
parquet: Any = pytest.importorskip("pyarrow.parquet")

NAMES = ["tench, Tinca tinca", "an English setter", "a cassette player"]  # not in sorted order


def shard(
    path: Path, images: list[Any], labels: list[Any], names: list[str] | None = None, rows: int = 4
) -> None:
    """One shard as the hub's `datasets` writes it, `rows` images a row group."""
    table = pyarrow.table({"image": images, "label": labels})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        said = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": said})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=rows)


def hub(tree: Path, split: str, folder: Path, shards: int = 3) -> Path:
    """`tree`/`split` as the hub publishes ImageNet: shuffled, wnids in the names of files only."""
    source = ImageFolderTree(tree / split)
    order = np.random.default_rng(0).permutation(len(source))
    published = "validation" if split == "val" else split
    for number, part in enumerate(np.array_split(order, shards)):
        rows = []
        for index in part.tolist():
            wnid, file = source.name(index).split("/")
            path = f"{Path(file).stem}_{wnid}.JPEG"
            rows.append({"bytes": source.read(index)[0], "path": path})
        name = f"{published}-{number:05}-of-{shards:05}.parquet"
        shard(folder / name, rows, source.labels[part].tolist(), NAMES)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Train and val of three classes."""
    make_tree(tmp_path / "tree")
    return make_tree(tmp_path / "tree", (2, 2, 2), split="val")


def write(out: Path, split: str, *source: object) -> beton.Manifest:
    words = ["--split", split, "--out_dir", str(out), "--num_workers", "1", *map(str, source)]
    assert write_ffcv.main(words) == 0
    return beton.verify_beton(out / f"{split}.beton")


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_hubs_shards_store_what_the_tree_stores(split: str, tree: Path, tmp_path: Path) -> None:
    data = hub(tree, split, tmp_path / "hub" / "data")
    by_tree = write(tmp_path / "a", split, "--data_dir", tree)
    by_shards = write(tmp_path / "b", split, "--parquet", data.parent)
    assert by_shards.content_checksum == by_tree.content_checksum
    assert by_shards.classes == by_tree.classes == ("n00000000", "n00000001", "n00000002")
    assert by_shards.class_counts == by_tree.class_counts
    # Laid out as the shards are read, numbered as the tree is.
    pointers = beton.read_tables(tmp_path / "b" / f"{split}.beton").pointers
    assert sorted(pointers) != pointers.tolist()
    assert write_ffcv.main(["--split", split, "--parquet", str(data), "--out_dir", str(tmp_path / "b")]) == 0  # fmt: skip


def test_a_part_is_small_and_reads_the_same(tree: Path, tmp_path: Path) -> None:
    source = ParquetShards(shards_of(hub(tree, "train", tmp_path / "hub"), "train"))
    reference = ImageFolderTree(tree / "train")
    part = pickle.loads(pickle.dumps(source.subset([9, 2])))
    assert [part.read(i) for i in (0, 1)] == [reference.read(9), reference.read(2)]
    assert [part.name(i) for i in (0, 1)] == [reference.name(9), reference.name(2)]
    assert sorted(source.reading_order().tolist()) == list(range(len(reference)))


def test_plain_shards_of_names(tree: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted((tree / "train").rglob("*.JPEG"))]
    shard(tmp_path / "train.parquet", files, ["b"] * 5 + ["a"] * 10)
    source = ParquetShards([tmp_path / "train.parquet"])
    assert source.classes == ("a", "b") and np.bincount(source.labels).tolist() == [10, 5]
    assert source.read(0)[0] == files[5] and source.name(0) == "a/train.parquet:1:1"


# ------------------------------------------------------------------------------------- classes

THOUSAND = [f"{name}, and a synonym" for name in imagenet_names().values()]
WNIDS = list(imagenet_names())


def test_imagenets_thousand_names_stand_for_its_wnids() -> None:
    assert is_imagenet(THOUSAND)
    assert not is_imagenet(THOUSAND[1:] + THOUSAND[:1]) and not is_imagenet(sorted(THOUSAND))
    assert class_names({0, 999}, {}, THOUSAND, "x") == {0: WNIDS[0], 999: WNIDS[999]}
    some_named = class_names({0, 1, 2}, {1: WNIDS[1]}, THOUSAND, "x")
    assert some_named == {0: WNIDS[0], 1: WNIDS[1], 2: WNIDS[2]}
    with pytest.raises(RunError, match=f"files of label 3 are named {WNIDS[4]}"):
        class_names({3}, {3: WNIDS[4]}, THOUSAND, "x")


def test_the_files_wnid_comes_first_then_the_name() -> None:
    assert class_names({0, 2}, {0: "n2", 2: "n1"}, NAMES, "x") == {0: "n2", 2: "n1"}
    assert class_names({0, 2}, {}, NAMES, "x") == {0: NAMES[0], 2: NAMES[2]}
    assert class_names({"b", "a"}, {}, None, "x") == {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    ("labels", "wnids", "said", "reason"),
    [
        ({0, 1}, {0: "n1"}, NAMES, "label 1 are not: are shards of two data sets mixed"),
        ({0, 1}, {0: "n1", 1: "n1"}, None, "are both called 'n1'"),
        ({0, 1}, {}, ["crane", "crane"], "are both called 'crane'"),
        ({0, 3}, {}, NAMES, "does not name 3"),
        ({5}, {}, None, "does not name 5"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(
    labels: set[Any], wnids: dict[Any, str], said: list[str] | None, reason: str
) -> None:
    with pytest.raises((RunError, UsageError), match=reason):
        class_names(labels, wnids, said, "x")


# ------------------------------------------------------------------------------------ refusals


def test_a_download_with_holes_is_refused(tree: Path, tmp_path: Path) -> None:
    data = hub(tree, "train", tmp_path / "hub")
    second = data / "train-00001-of-00003.parquet"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"00001-of-00003.parquet cannot be read, is its download"):
        write(tmp_path, "train", "--parquet", data)
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(RunError, match=r"only Git's pointer.*git lfs pull"):
        write(tmp_path, "train", "--parquet", data)
    second.unlink()
    with pytest.raises(RunError, match="2 of the 3 shards of train, train-00001-of-00003 is miss"):
        write(tmp_path, "train", "--parquet", data)
    first = data / "train-00000-of-00003.parquet"
    with pytest.raises(RunError, match=r"00003\.parquet has 1 of the 3 shards of train"):
        write(tmp_path, "train", "--parquet", first)
    with pytest.raises(UsageError, match="is a shard of train, and --split is val"):
        write(tmp_path, "val", "--parquet", first)
    shutil.rmtree(data)
    with pytest.raises(UsageError, match="has no shards of val: expected validation-00000-of"):
        write(tmp_path, "val", "--parquet", tmp_path)


def test_shards_that_are_not_images_with_labels(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    cases: list[tuple[list[Any], list[Any], str]] = [
        (["text"], [0], "holds string, not encoded images"),
        ([b"x"], [0.5], "holds double, not numbers or names"),
        ([b"x"], [-1], "images without labels"),
        ([{"bytes": b"x", "path": None}], [None], "holds null, not numbers|without labels"),
        ([{"bytes": b"x", "path": "a_n00000001.JPEG"}, {"bytes": b"x", "path": "a_n00000002.JPEG"}],
         [0, 0], "label 0 is n00000001 and n00000002"),
    ]  # fmt: skip
    for images, labels, reason in cases:
        shard(path, images, labels)
        with pytest.raises((RunError, UsageError), match=reason):
            ParquetShards([path])
    parquet.write_table(pyarrow.table({"image": [b"x"], "class": [0]}), path)
    with pytest.raises(UsageError, match="has no column 'label', it has image, class"):
        ParquetShards([path])


def test_an_image_of_which_only_a_path_is_there(tmp_path: Path) -> None:
    shard(tmp_path / "train.parquet", [{"bytes": None, "path": "a.jpg"}, None], ["a", "b"])
    source = ParquetShards([tmp_path / "train.parquet"])
    for index in (0, 1):
        with pytest.raises(OSError, match="holds no bytes of it"):
            source.read(index)


def test_without_pyarrow_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"needs pyarrow.*pip install pyarrow"):
        write(tmp_path, "train", "--parquet", tmp_path)


# -------------------------------------------------------------------------------------- verify


def test_verify_takes_shards(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = hub(tree, "val", hub(tree, "train", tmp_path / "hub"), shards=1)

    def run(*words: object) -> tuple[int, str]:
        status = verify.main([*map(str, words), "--num_workers", "1"])
        return status, capsys.readouterr().out

    status, said = run(data)
    assert status == 0 and "15 images of 3 classes" in said and "all 6 images decode" in said
    assert "the same 3 classes in the same order" in said
    write(tmp_path, "train", "--parquet", data)
    status, said = run(tmp_path / "train.beton", "--parquet", data)
    assert status == 0 and "15 of 15 samples equal" in said
    (data / "train-00002-of-00003.parquet").unlink()
    status, said = run(data)
    assert status == 1 and "2 of the 3 shards" in said
    shard(data / "one.parquet", [b"no image", b""], ["a", "b"])
    status, said = run(data / "one.parquet")
    assert status == 1 and said.count("does not decode") >= 2


def test_shards_that_cost_more_than_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.parquet"
    cases: list[tuple[list[Any], list[Any], str]] = [
        ([b"x"], [[0]], "holds list<.*>, not numbers or names"),
        ([b"x"], [{"int": "a"}], "holds struct<int: string>, not numbers"),
        ([{"bytes": 1}], [0], "holds struct<bytes: int64>, not encoded images"),
        ([{"bytes": b"x", "path": 1}], [0], "not encoded images"),
        ([b"x"], ["a\nb"], r"calls a class 'a\\nb', which has control characters"),
        ([{"bytes": b"x", "path": "a" * 10**6}], ["a"], "a file name of 1,000,000 characters"),
        ([b"x"] * 10**5, [0] * 10**5, "says that it holds 100,000 images in"),
    ]  # fmt: skip
    for images, labels, reason in cases:
        shard(path, images, labels, rows=10**6)
        with pytest.raises((RunError, UsageError), match=reason):
            ParquetShards([path])
    # One value, named 10,000 times; the bounds are lower here to save the test from filling them.
    monkeypatch.setattr(bounded, "SPARE", 64 << 20)
    monkeypatch.setattr(bounded, "THREAD", 8 << 20)
    monkeypatch.setattr(shards, "LARGEST_LABELS", 64 << 20)
    label = pyarrow.DictionaryArray.from_arrays(np.zeros(10_000, "i4"), ["a" * 10**6])
    parquet.write_table(pyarrow.table({"image": [bytes(9)] * 10_000, "label": label}), path)
    with pytest.raises(RunError, match="unpack to more than 64 MB"):
        ParquetShards([path])

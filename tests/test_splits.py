"""A validation split under any name, held out, from a table, from several folders, or lacking a class."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import write_ffcv
from ffcv_imnet.config.schema import Data
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.data.loader import check_data
from ffcv_imnet.images.holdout import choose
from ffcv_imnet.images.sources import open_source
from ffcv_imnet.tools import verify
from tests.conftest import SmallData
from tests.pictures import picture, save

NAMES = ("cat", "dog", "eel")


def images(folder: Path, counts: tuple[int, ...] = (6, 5, 4), seed: int = 0) -> Path:
    """Class folders `NAMES` of different images in `folder`, none for a count of 0."""
    for name, count in zip(NAMES, counts, strict=True):
        for _ in range(count):
            seed += 1
            save(folder / name / f"{seed}.jpg", picture(seed, 20, 24))
    return folder


def write(out: Path, *words: object) -> beton.Manifest:
    """Write; the manifest of the split, of val where both were written."""
    options = [*map(str, words), "--out_dir", str(out), "--num_workers", "1"]
    assert write_ffcv.main(options) == 0
    return beton.verify_beton(out / ("train.beton" if "train" in words else "val.beton"))


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "test"])
def test_the_folder_that_is_there_is_taken(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path / "d" / name)
    assert open_source("val", [tmp_path / "d"]).where == str(tmp_path / "d" / name)
    assert f"d/{name} is taken for val" in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"give val, which takes the folder {name}"):
        write_ffcv.main(["--split", name, "--data_dir", str(tmp_path / "d")])
    images(tmp_path / "d" / "val")
    assert open_source("val", [tmp_path / "d"]).where.endswith("/val")


# ------------------------------------------------------------------------------------- held out


def sides(chosen: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int]]:
    return np.bincount(labels[~chosen]).tolist(), np.bincount(labels[chosen]).tolist()


def test_held_out_are_whole_groups_of_one_content_from_every_class() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        labels = np.sort(np.concatenate([np.arange(9), rng.integers(0, 9, 191)]))
        labels = np.concatenate([labels, np.arange(9)])  # two different ones in each class
        contents = [b"%d" % n for n in range(200)] + [b"other %d" % n for n in range(9)]
        for copy in range(0, 190, 5):  # copies, across classes too
            contents[copy + rng.integers(1, 9)] = contents[copy]
        chosen = choose(contents, labels, [str(n) for n in range(9)], 0.2, seed)
        train, val = sides(chosen, labels)
        assert min(train) >= 1 and min(val) >= 1
        held = {c for c, v in zip(contents, chosen, strict=True) if v}
        assert held.isdisjoint(c for c, v in zip(contents, chosen, strict=True) if not v)
        assert 0.1 < chosen.mean() < 0.25
        again = choose(contents, labels, [str(n) for n in range(9)], 0.2, seed)
        assert np.array_equal(chosen, again)
    assert not np.array_equal(chosen, choose(contents, labels, ["x"] * 9, 0.2, 99))


def test_held_out_is_the_share_of_each_class_where_there_are_no_copies() -> None:
    labels = np.repeat(np.arange(3), (100, 20, 3))
    contents = [b"%d" % n for n in range(123)]
    chosen = choose(contents, labels, NAMES, 0.1, 0)
    assert sides(chosen, labels) == ([90, 18, 2], [10, 2, 1])
    # An image more moves no other.
    more = choose([*contents, b"new"], np.append(labels, 1), NAMES, 0.1, 0)
    assert (more[:-1] != chosen).sum() <= 1
    with pytest.raises(
        UsageError, match=r"1 of 3 classes have not two different images.* eel: add"
    ):
        choose(contents[:120] + [b"same"] * 3, labels, NAMES, 0.1, 0)


def test_both_files_come_from_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, out = images(tmp_path / "d"), tmp_path / "out"
    for copy in range(4):  # of one image, under other names and in another class
        (tree / NAMES[copy % 2] / f"copy{copy}.jpg").write_bytes((tree / "cat/1.jpg").read_bytes())
    words = ("--data_dir", tree, "--holdout", "0.3", "--seed", "5")
    val = write(out, *words)
    train = beton.verify_beton(out / "train.beton")
    assert train.samples + val.samples == 19 and train.classes == val.classes == NAMES
    assert min(train.class_counts) >= 1 and min(val.class_counts) >= 1
    for said in (train, val):
        assert (said.settings["holdout"], said.settings["seed"]) == (0.3, 5)
    pixels: list[set[bytes]] = []
    for split in ("train", "val"):
        path, tables = out / f"{split}.beton", beton.read_tables(out / f"{split}.beton")
        data = path.read_bytes()
        rows = zip(tables.pointers.tolist(), tables.sizes.tolist(), strict=True)
        pixels.append({data[start : start + size] for start, size in rows})
    assert pixels[0].isdisjoint(pixels[1]) and len(pixels[0] | pixels[1]) == 15

    capsys.readouterr()
    write(out, *words)
    assert capsys.readouterr().out.count("is up to date") == 2
    (out / "val.beton").unlink()  # a run that was stopped between the two
    assert write(out, *words).content_checksum == val.content_checksum
    with pytest.raises(UsageError, match=r"--holdout 0.3, and this command has --holdout 0.4; --f"):
        write(out, *words[:3], "0.4", "--seed", "5")
    images(tmp_path / "e" / "train", seed=50)
    with pytest.raises(
        UsageError, match=r"with --holdout 0.3, and this command has no --holdout; --f"
    ):  # and nothing on the images, which are of another folder then
        write(out, "--data_dir", tmp_path / "e", "--split", "train", "--seed", "5")
    with pytest.raises(UsageError, match="--holdout writes both files"):
        write(out, "--split", "val", *words)
    for split in ("train", "val"):
        path = out / f"{split}.beton"
        assert verify.main([str(path), "--data_dir", str(tree), "--num_workers", "1"]) == 0
    assert f"{val.samples} of {val.samples} samples equal {tree}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- tables


def test_neither_file_has_its_name_before_both_are_written(tmp_path: Path) -> None:
    """A new training file beside the old validation file would hold its images."""
    data = images(tmp_path / "d", (12, 12, 12))
    words = ["--data_dir", data, "--holdout", 0.25]
    old = write(tmp_path / "out", *words)
    before = (tmp_path / "out/train.beton").read_bytes()
    for path in data.rglob("*.jpg"):  # no two alike, which fall on one side
        path.write_bytes(path.name.encode())
    save(data / "cat/0.jpg", picture(99, 20, 24))
    with pytest.raises(RunError, match=r"train.*unreadable.*; .*val.*unreadable"):
        write(tmp_path / "out", *words, "--force")
    assert (tmp_path / "out/train.beton").read_bytes() == before
    assert beton.verify_beton(tmp_path / "out/val.beton") == old
    assert not list((tmp_path / "out").glob("*.partial"))


def test_files_of_two_divisions_do_not_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = images(tmp_path / "d", (12, 12, 12))
    for seed in (0, 1):
        write(tmp_path / f"{seed}", "--data_dir", data, "--holdout", 0.25, "--seed", seed)
    pair = Data(
        train_dataset=str(tmp_path / "0/train.beton"), val_dataset=str(tmp_path / "0/val.beton")
    )
    check_data(pair)
    for suffix in ("beton", "json"):
        shutil.copy(tmp_path / f"1/val.{suffix}", tmp_path / "0")
    with pytest.raises(UsageError, match="two divisions by --holdout"):
        check_data(pair)
    assert verify.main([str(tmp_path / "0")]) == 1
    assert "two divisions by --holdout" in capsys.readouterr().out


def test_a_shared_folder_is_divided_by_two_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path / "pics")
    rows = [f"{path.parent.name}/{path.stem}.JPG" for path in sorted(folder.rglob("*.jpg"))]
    lines = [f"{row},golden {row.split('/')[0]}\n" for row in rows]
    (tmp_path / "train.csv").write_text("image,label\n" + "".join(lines[::2]))
    (tmp_path / "val.csv").write_text("".join(lines[1::2]))
    found = {}
    for split in ("train", "val"):
        table = ("--labels", tmp_path / f"{split}.csv")
        found[split] = write(tmp_path / "out", "--split", split, "--data_dir", folder, *table)
        assert found[split].classes == ("golden cat", "golden dog", "golden eel")
    assert found["train"].samples + found["val"].samples == 15
    assert "note: 7 of the 15 images of " in capsys.readouterr().out
    (tmp_path / "val.csv").write_text("1.jpg,x\n2.jpg,y\n")
    for name in ("1.jpg", "2.jpg"):
        (folder / "cat" / name).unlink()
    with pytest.raises(UsageError, match=r"no label has an image in .* labels are of '1.jpg'"):
        write(tmp_path / "out2", "--split", "val", "--data_dir", folder, *table)


# ------------------------------------------------------------------------------- several folders


def test_several_folders_are_merged_by_class(tmp_path: Path) -> None:
    first = images(tmp_path / "a" / "train", (3, 2, 0)).parent
    second = images(tmp_path / "b" / "train", (1, 0, 2), seed=50).parent
    source = open_source("train", [first, second])
    assert tuple(source.classes) == NAMES and source.labels.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    names = [source.name(index) for index in range(8)]
    assert names[3] == "b/train/cat/51.jpg" and len(set(names)) == 8
    part = source.subset([7, 3])
    assert part.name(1) == names[3] and part.read(1) == source.read(3)
    assert (tmp_path / names[7]).read_bytes() == part.read(0)[0] and part.read(0)[1] == 2
    said = write(tmp_path / "out", "--split", "train", "--data_dir", first, "--data_dir", second)
    assert said.class_counts == (4, 2, 2)
    words = [str(tmp_path / "out"), "--data_dir", str(first), "--data_dir", str(second)]
    assert verify.main([*words, "--num_workers", "1"]) == 0


def test_a_validation_folder_that_holdout_does_not_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        images(tmp_path / "d" / split)
    (tmp_path / "d" / "dev").mkdir()
    write(tmp_path / "out", "--data_dir", tmp_path / "d", "--holdout", "0.3")
    said = capsys.readouterr().err
    assert "d/val is not read: with --holdout both" in said and "d/dev" not in said


def test_images_of_the_same_bytes_in_two_classes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = images(tmp_path / "d" / "train")
    (root / NAMES[0] / "twin.jpg").write_bytes((root / NAMES[0] / "1.jpg").read_bytes())
    words = ("--split", "train", "--data_dir", tmp_path / "d")
    count = write(tmp_path / "one", *words).samples
    assert "same bytes" not in capsys.readouterr().out  # in one class
    copy = root / NAMES[1] / "other.jpg"
    copy.write_bytes((root / NAMES[0] / "1.jpg").read_bytes())
    assert write(tmp_path / "two", *words).samples == count + 1
    said = capsys.readouterr().out
    assert (
        f"note: images of the same bytes are in two classes, and stored under both: {NAMES[0]}/"
        in said
    )
    assert f" and {NAMES[1]}/other.jpg (1 in all)\n" in said


# ---------------------------------------------------------------------------- a class without images


def test_a_class_may_have_no_validation_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path / "d" / "val", (2, 0, 2))
    (tmp_path / "d" / "val" / "dog").mkdir()
    words = ("--split", "val", "--data_dir", tmp_path / "d")
    assert write(tmp_path / "out", *words).class_counts == (2, 0, 2)
    assert "1 of the 3 classes of" in capsys.readouterr().err
    assert write(tmp_path / "some", *words, "--subset", 3).samples == 3
    (tmp_path / "d" / "val" / "dog").rmdir()
    with pytest.raises(UsageError, match="is there already and differs"):
        write(tmp_path / "out", *words)  # two classes are not three
    (tmp_path / "d" / "train" / "dog").mkdir(parents=True)
    with pytest.raises(UsageError, match="no images in any"):
        write(tmp_path / "out", "--split", "train", "--data_dir", tmp_path / "d")


def test_a_class_that_is_only_trained_keeps_the_numbers_of_the_others(
    tmp_path: Path, small: SmallData, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffcv_imnet.data import loader
    from tests.test_data import ALONE

    images(tmp_path / "d" / "train")
    images(tmp_path / "d" / "val", (2, 0, 3))  # no folder dog: there eel is class 1
    for split in ("train", "val"):
        write(tmp_path, "--split", split, "--data_dir", tmp_path / "d")
    settings = small.settings(
        tmp_path / "run",
        data__train_dataset=tmp_path / "train.beton",
        data__val_dataset=tmp_path / "val.beton",
    )
    capsys.readouterr()
    train, val = loader.check_data(settings.data)
    assert capsys.readouterr().err.count("1 of the 3 classes have no image in") == 1
    places = loader.class_places(train.classes, val.classes)
    assert places == [0, 2] and loader.class_places(val.classes, train.classes) is None
    val_loader = loader.ValLoader(settings.data.val_dataset, 5, settings, ALONE, places)
    (_, labels), *_ = val_loader.batches()
    assert labels.tolist() == [0, 0, 2, 2, 2]
    again = replace(settings.data, val_dataset=settings.data.train_dataset)
    loader.check_data(again)
    assert capsys.readouterr().err.count("train.beton has the same images as ") == 1


def test_files_that_are_swapped_are_said(
    tmp_path: Path, small: SmallData, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffcv_imnet.data import loader

    data = small.settings(tmp_path).data
    loader.check_data(data)
    assert "swapped" not in capsys.readouterr().err
    loader.check_data(replace(data, train_dataset=data.val_dataset, val_dataset=data.train_dataset))
    assert "val.beton was written as val and " in (said := capsys.readouterr().err), said
    assert said.endswith("train.beton as train: are they swapped?\n")

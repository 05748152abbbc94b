"""A .beton of FFCV's own writer: adopted, read under its own field names, trained on."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.networks
import train_imagenet
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data import beton
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.tools import adopt
from tests.conftest import SmallData
from tests.pictures import picture

CLASSES = 3


class Numbered:
    """Sample i: image i, of varying size, class i modulo `CLASSES`; in the order of the fields."""

    def __init__(self, count: int, label_first: bool = False) -> None:
        self.count, self.label_first = count, label_first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        pair = picture(index, 40 + index % 7, 48 + index % 5), index % CLASSES
        return pair[::-1] if self.label_first else pair


def theirs(path: Path, fields: dict[str, Any], samples: Any, workers: int = 1) -> Path:
    """`path` as ffcv's DatasetWriter writes it."""
    from ffcv.writer import DatasetWriter

    writer = DatasetWriter(str(path), fields, num_workers=workers, page_size=1 << 21)
    writer.from_indexed_dataset(samples, chunksize=5)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for each way of storing, the training file by two workers, the label in front."""
    from ffcv.fields import IntField, RGBImageField

    folder = tmp_path_factory.mktemp("theirs")
    first = {"target": IntField(), "photo": RGBImageField(write_mode="proportion")}
    theirs(folder / "train_500_0.50_90.ffcv", first, Numbered(60, label_first=True), workers=2)
    modes: dict[str, dict[str, Any]] = {
        "jpg": {}, "raw": {}, "smart": {"smart_threshold": 5000},
    }  # fmt: skip
    for mode, options in modes.items():
        image = RGBImageField(write_mode=mode, max_resolution=44, **options)
        theirs(folder / f"{mode}_val.beton", {"image": image, "label": IntField()}, Numbered(12))
    return folder


def run(*words: object) -> int:
    return adopt.main([*map(str, words), "--num_workers", "1"])


def test_their_files_train(
    files: Path, tmp_path: Path, small: SmallData, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = files / "train_500_0.50_90.ffcv", files / "jpg_val.beton"
    settings = small.settings(
        tmp_path / "run",
        training__epochs=1,
        data__train_dataset=train,
        data__val_dataset=val,
    )
    with pytest.raises(UsageError, match=f"`python -m ffcv_imnet adopt {train} {val}`"):
        train_imagenet.train(settings, None, time.perf_counter())

    assert run(train, *(files / f"{mode}_val.beton" for mode in ("jpg", "raw", "smart"))) == 0
    assert "60 images of 3 classes (0 to 2)" in capsys.readouterr().out
    said = beton.check_beton(train)
    assert (said.split, said.samples, said.classes) == ("train", 60, ("0", "1", "2"))
    assert said.class_counts == (20, 20, 20) and said.bytes == train.stat().st_size
    assert said.content_checksum == beton.content_checksum(train)
    assert 0 < said.source["raw"] < 60, "one way of storing would prove little"
    assert 0 < json.loads((files / "smart_val.json").read_text())["source"]["raw"] < 12
    beton.verify_beton(train)
    labels = beton.read_tables(train).labels
    assert labels.tolist() == [index % CLASSES for index in range(60)]
    assert train_imagenet.train(settings, None, time.perf_counter()) == 0
    epoch = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[1])
    assert epoch["type"] == "epoch" and epoch["top_1"] >= 0


def test_their_pixels_and_labels_come_out_of_the_loader(
    files: Path, tmp_path: Path, small: SmallData
) -> None:
    from ffcv_imnet.data import loader
    from tests.test_data import ALONE

    path = files / "train_500_0.50_90.ffcv"  # the label in front of the image
    settings = small.settings(
        tmp_path, validation__resolution=40, validation__crop_ratio=1, validation__batch_size=60
    )
    (images, labels), *_ = loader.ValLoader(str(path), 60, settings, ALONE).batches()
    assert labels[:60].tolist() == [index % CLASSES for index in range(60)]
    for index in (0, 7, 14):  # 40 px high: cropped, not resized
        width = picture(index, 40, 48 + index % 5).shape[1]
        left = (width - 40) // 2
        wanted = picture(index, 40, width)[:, left : left + 40]
        found = images[index].permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - wanted).mean() < 3, index


def test_what_cannot_be_adopted_is_said(files: Path, tmp_path: Path) -> None:
    from ffcv.fields import FloatField, IntField, RGBImageField

    path = Path(shutil.copy(files / "jpg_val.beton", tmp_path / "val.beton"))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n")
    with pytest.raises(UsageError, match="2 names, but labels up to 2"):
        run(path, "--classes", names)
    names.write_text("ant\nbee\nant\n")
    with pytest.raises(UsageError, match="'ant' stands in lines 1 and 3"):
        run(path, "--classes", names)
    names.write_text("ant\nbee\ngolden jackal\ndodo\n")
    assert run(path, "--classes", names) == 0
    assert beton.check_beton(path).classes == ("ant", "bee", "golden jackal", "dodo")
    with pytest.raises(UsageError, match=r"has its manifest .*--force"):
        run(path)
    assert run(path, "--force", "--classes", beton.manifest_path(path)) == 0

    class Late(Numbered):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return picture(index), 2 * (index % 2) + 1

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    late = theirs(tmp_path / "late.beton", fields, Late(2))
    with pytest.raises(UsageError, match=r"no image has the label 0, and labels go from 1 to 3"):
        run(late)
    floats = {"image": RGBImageField(write_mode="raw"), "angle": FloatField()}
    with pytest.raises(UsageError, match=r"'angle' \(FloatField\).*write it again"):
        run(theirs(tmp_path / "float.beton", floats, Late(2)))
    assert not (tmp_path / "late.json").exists() and not (tmp_path / "float.json").exists()


def test_a_damaged_image_is_found_wherever_it_lies(files: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(files / "jpg_val.beton", tmp_path / "val.beton"))
    place = int(beton.read_tables(path).pointers[7])
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(20))
    with pytest.raises(RunError, match=r"1 of 12 images .* sample 7 does not decode .*--keep_dam"):
        run(path)
    assert not beton.manifest_path(path).exists()
    assert run(path, "--keep_damaged") == 0
    assert beton.check_beton(path).source["damaged"] == 1


def test_imagenets_names_where_its_counts_fit() -> None:
    """By the tables alone: 50,000 samples of a thousand classes."""

    def tables(count: int, classes: int) -> beton.Tables:
        zeros = np.zeros(count, np.uint64)
        return beton.Tables(
            labels=np.arange(count) % classes,
            modes=zeros.astype(np.uint8),
            heights=zeros.astype(np.uint16),
            widths=zeros.astype(np.uint16),
            pointers=zeros,
            sizes=zeros,
            start=0,
            end=0,
            page_size=1,
            checksum="",
        )

    val = Path("val.ffcv")
    assert adopt.class_names({val: tables(50_000, 1000)}, None) == tuple(imagenet_names())
    assert adopt.class_names({val: tables(49_999, 1000)}, None)[999] == "999"
    both = {Path("train.ffcv"): tables(2000, 1000), val: tables(50, 10)}
    assert len(adopt.class_names(both, None)) == 1000


assert tests.networks  # registers the tiny network


def test_a_manifest_with_names_is_not_replaced_by_numbers(small: SmallData) -> None:
    with pytest.raises(UsageError, match="knows its classes by name: keep it"):
        adopt.main([str(small.train), "--force"])

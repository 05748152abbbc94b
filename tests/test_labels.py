"""Labels of flat validation images, in each of the three forms."""

import base64
import gzip
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.images import label_table
from ffcv_imnet.images.labels import _synsets, all_labelled, labels_of, read_labels

# scipy.io.savemat's own: three synsets in the devkit's order, which is not that of the wnids.
MAT = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAg"
    "ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAAAAAAAAAAAAABSU0PAAAA"
    "WAEAAHic7VTBSsNAEJ02tbUgoXrymA/oISnBpicDerAgIir1GEKyJovJRrJb1D/wA/qh/QR37aZul2AgIr04ZBLm"
    "7b63zOQlJgCs+wD8gkOeXdjEgawNnh2ZA570nVDEKF/vwbHEP3jOr+8XdxcT25kE80sh8HizeW7jtShjqgJJVtAd"
    "gCzzIEpxFpeIfAE7RaVBEAtShJOUSQorQ0wCnIcJomBy0IPvfkytn46SIo4UHOR+X+H3avhDZf9I1sSeOM5s6s0U"
    "nasGnVNNR9TPmFlPxdvYWiyzF0StPIzKgmGq91WnN9D0RB1amzHr/H7DXIYSr0Lw7R/4Vaj8ivfbc1vzb1d+Wz9U"
    "30F7Pziua0/PXEWnyQ8nmo6oGSJROrYeMIlCi4l7/Vz+/fC3fjCU831o9X+wPW4IR9GxG3SMHR0D4iLZ93v39f7r"
    "+F2NP9rS1+eqzj598Am6+FME"
)


def devkit(path: Path, mat: bytes = MAT, truth: bytes = b"2\n3\n1\n2\n") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (("meta.mat", mat), ("ILSVRC2012_validation_ground_truth.txt", truth)):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_devkit_numbers_become_wnids(tmp_path: Path) -> None:
    assert read_labels(devkit(tmp_path / "devkit.tar.gz")) == {
        "ILSVRC2012_val_00000001": "n01440764",
        "ILSVRC2012_val_00000002": "n02084071",
        "ILSVRC2012_val_00000003": "n02119789",
        "ILSVRC2012_val_00000004": "n01440764",
    }


@pytest.mark.parametrize("compressed", [False, True])
def test_synsets_are_those_that_scipy_reads(compressed: bool) -> None:
    rows = [
        (number, wnid, f"word {number}, größer", np.arange(number))
        for number, wnid in ((1, "n02119789"), (300, "n02100735"), (70_000, "n02096294"))
    ]
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("children", "O")]
    file = io.BytesIO()
    held = {"first": np.eye(2), "synsets": np.array(rows, fields).reshape(3, 1)}
    savemat(file, held, do_compression=compressed)
    read = loadmat(io.BytesIO(file.getvalue()), simplify_cells=True)["synsets"]
    expected = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in read}
    assert _synsets(file.getvalue()) == expected == {row[0]: row[1] for row in rows}


def test_damaged_devkit(tmp_path: Path) -> None:
    path = tmp_path / "devkit.tar.gz"
    for cut in range(0, len(MAT), 7):
        with pytest.raises(UsageError):
            read_labels(devkit(path, MAT[:cut]))
    with pytest.raises(UsageError, match="do not agree"):
        read_labels(devkit(path, truth=b"9\n"))
    path.write_bytes(devkit(path).read_bytes()[:200])
    with pytest.raises(UsageError, match="no devkit, or is truncated"):
        read_labels(path)


def packed(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_bombs_in_a_devkit_are_one_sentence(tmp_path: Path) -> None:
    """A pax header of gigabytes, and a variable of meta.mat that inflates to as much."""
    path = tmp_path / "devkit.tar.gz"
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, 5 << 30
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(pax.tobuf())
        for _ in range(70):
            file.write(bytes(1 << 20))
    with pytest.raises(UsageError, match=r"devkit\.tar\.gz unpacks to more than 64 MB"):
        read_labels(path)
    stream = zlib.compress(bytes(9 << 20))
    mat = MAT[:128] + struct.pack("<II", 15, len(stream)) + stream
    with pytest.raises(UsageError, match=r"meta\.mat unpacks to more than 8 MB"):
        read_labels(devkit(path, mat))
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 6
    path.write_bytes(gzip.compress((info.tobuf() + b"6 a=b\n".ljust(512, b"\0")) * 3000))
    with pytest.raises(UsageError, match=r"devkit\.tar\.gz"):
        read_labels(path)


KAGGLE = """ImageId,PredictionString
ILSVRC2012_val_00000001,n02102040 0 0 223 223 n02102040 1 2 3 4
ILSVRC2012_val_00000002,n01440764 0 0 223 223
"""
TEXT = "\ufeffval/ILSVRC2012_val_00000001.JPEG  n02102040\r\n\nval/ILSVRC2012_val_00000002.JPEG n01440764"


def matrix(inside: bytes, name: bytes = b"", rows: int = 1) -> bytes:
    """An element of a .mat file: a cell array of one column."""
    head = struct.pack("<4I", 6, 8, 1, 0) + struct.pack("<2I2i", 5, 8, rows, 1)
    body = head + struct.pack("<2I", 1, len(name)) + name + inside
    return struct.pack("<2I", 14, len(body)) + body


def nested(deep: int) -> bytes:
    head = matrix(b"")[8:]
    return b"".join(
        struct.pack("<2I", 14, (8 + len(head)) * n - 8) + head for n in range(deep, 0, -1)
    )


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        (nested(100_000), "has no struct array|synsets"),  # a segmentation fault in scipy
        (matrix(b"", b"synsets\0", rows=1 << 30), "has no struct array synsets"),
        (b"\x0e\0\0\0\xff\0\0\0", "is truncated"),
    ],
)
def test_matrices_of_a_devkit_are_bounded(elements: bytes, reason: str, tmp_path: Path) -> None:
    small = zlib.compress(elements)
    for mat in (elements, struct.pack("<2I", 15, len(small)) + small):
        with pytest.raises(UsageError, match=reason):
            read_labels(devkit(tmp_path / "devkit.tar.gz", MAT[:128] + mat))


@pytest.mark.parametrize("text", [KAGGLE, TEXT])
def test_texts(text: str, tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")
    wnids = read_labels(path)
    assert list(wnids.values()) == ["n02102040", "n01440764"]
    files = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    classes, labels = labels_of(files, wnids, "x")
    assert classes == ("n01440764", "n02102040") and labels.tolist() == [1, 0]
    _, labels = labels_of([*files, "z.jpg"], wnids, "x", "/data/val")
    assert labels.tolist() == [1, 0, -1]
    reason = r"1 of the 3 images of x have no label, for instance z\.jpg"
    with pytest.raises(RunError, match=reason):
        all_labelled([*files, "z.jpg"], labels, "x")


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\na b.jpg,golden jackal\nd/c.PNG,eel\n",
        '"File Name";"id";"Class"\n"a b.jpg";3;"golden jackal"\n\n"d/c.png";4;"eel"\n',
        "./a b.jpg\tgolden jackal\nd\\c.png\teel\n",
        "golden jackal,a b.jpg\neel,d/c.png\n",
        '{"file_name": "a b.jpg", "label": "golden jackal"}\n{"label": "eel", "file_name": "d/c"}\n',
        '"a b.jpg" "golden jackal"\nd/c.png   eel\n',
        "photo,kind\nx/a b.jpg,golden jackal\nx/d/c.png,eel\n",
    ],
    ids=["csv", "semicolons", "tsv", "class first", "json", "spaces", "folders above"],
)
def test_tables(text: str, tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")
    classes, labels = labels_of(["a b.JPG", "d/c.png"], read_labels(path), "x", "/data/x")
    assert classes == ("eel", "golden jackal") and labels.tolist() == [1, 0]


def test_classes_of_ones_own_images_may_be_numbers(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    for text in (
        "dog/x.JPEG,0\ncat/x.JPEG,1\n",
        '{"file": "dog/x.JPEG", "label": 0}\n{"file": "cat/x.JPEG", "label": 1}',
    ):
        path.write_text(text)
        classes, labels = labels_of(["cat/x.JPEG", "dog/x.JPEG"], read_labels(path), "x")
        assert classes == ("0", "1") and labels.tolist() == [1, 0]


def test_a_row_is_of_one_image_and_the_longest_row_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {"1.jpg": "ant", "b/1.jpg": "bee", "2.jpg": "cat", "2.png": "dog", "9.jpg": "eel"}
    files = ["a/1.jpg", "b/1.jpg", "2.jpg", "2.png", "2.webp"]
    classes, labels = labels_of(files, rows, "x")
    assert [classes[n] if n >= 0 else None for n in labels] == ["ant", "bee", "cat", "dog", None]
    said = capsys.readouterr().err
    assert "1 of 5 labels have no image in x, for instance '9.jpg'" in said
    # Folders that are not on the disk at all do not matter, as long as the names tell.
    assert labels_of(["2.jpg", "1.jpg"], {"x/1.jpg": "ant", "y/2.JPG": "bee"}, "x")[1].tolist() == [
        1,
        0,
    ]
    assert labels_of(["1.jpg"], {"x/1.jpg": "ant", "y/1.jpg": "bee"}, "x")[0] == ()
    with pytest.raises(RunError, match=r"label of '1' fits two images of x, a/1.jpg and b/1.jpg"):
        labels_of(["a/1.jpg", "b/1.jpg"], {"1": "ant"}, "x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ILSVRC2012_val_00000001.JPEG 7", "line 1: the class is the number 7.* such as class7"),
        ("n01440764/1.JPEG 7", "line 1: the class is the number 7"),
        ("a.jpg", "not an image and a class"),
        ("a.jpg golden jackal", "names with spaces need commas, tabs or quotes"),
        ("a.jpg x\na.jpg y", "line 2: 'a.jpg' has two classes"),
        ("filename,label,label\na.jpg,x,y", "line 1: 2 columns are called 'label'"),
        ("image id,imageId,label\na,b,y", "line 1: 2 columns are called 'image id'"),
        ('{"file": "a", "label": "x", "label": "y"}', "line 1: 2 columns are called 'label'"),
        ('{"file": "a", "Label": "x", "label": "y"}', "line 1: 2 columns are called 'Label'"),
        ("a.jpg ../x", "cannot be the name of a class"),
        ("a.jpg,x,y\nb.jpg,x,y", "3 columns and no first line that says .* call them filename"),
        ("a.jpg,x\nb.jpg,jackal, golden", "line 2: .* has 3 columns, not 2: .* ',' needs quotes"),
        ('a.jpg,"x', "line 1: not CSV"),
        ("a.jpg,", "line 1: the class '' is empty"),
        ('{"file": "a.jpg"}', "line 1: no class .* among 'file': call it label"),
        ('{"file": "a.jpg", "label": true}', "line 1: its class 'label' is true, which is neither"),
        ("[1]", "a list in JSON: write an object a line"),
        (
            "file,label,split\na.jpg,cat,train\nb.jpg,dog,val",
            "column 'split' says 'train', 'val', which",
        ),
        ('{"file": ', "line 1: not JSON"),
        ("ImageId,PredictionString\n", "holds no labels"),
        ("", "holds no labels"),
        ("\udcff\udcfe", "is not in UTF-8: save it as CSV in UTF-8"),
    ],
)
def test_wrong_texts(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UsageError, match=reason):
        read_labels(path)


def test_tables_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "labels.jsonl").write_text('{"a":' * 5000)
    with pytest.raises(UsageError, match=r"line 1: not JSON \("):
        read_labels(path)
    path.write_text('{"file": "a.jpg", "label": "' + "x" * 200_000 + '"}')
    with pytest.raises(UsageError, match="line 1: it has more than 131,072 characters"):
        read_labels(path)
    monkeypatch.setattr(label_table, "LARGEST", 1 << 10)
    with pytest.raises(UsageError, match="cannot be read: it has more than 1 kB"):
        read_labels(path)
    os.mkfifo(pipe := tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(UsageError, match="cannot be read: it is a pipe"):
        read_labels(pipe)

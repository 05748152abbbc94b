"""Labels of flat validation images, in each of the three forms."""

import base64
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.images.labels import labels_of, read_labels, read_mat

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


def test_damaged_devkit(tmp_path: Path) -> None:
    path = tmp_path / "devkit.tar.gz"
    for cut in range(0, len(MAT), 7):
        with pytest.raises(UsageError):
            read_labels(devkit(path, MAT[:cut]))
    with pytest.raises(UsageError, match="do not agree"):
        read_labels(devkit(path, truth=b"9\n"))
    path.write_bytes(devkit(path).read_bytes()[:200])
    with pytest.raises(UsageError, match="no devkit, or is cut off"):
        read_labels(path)


def test_mat_fields() -> None:
    (synsets,) = read_mat(MAT)
    assert synsets.name == "synsets"
    assert [int(m.values[0]) for m in synsets.fields["ILSVRC2012_ID"]] == [1, 2, 3]
    assert bytes(synsets.fields["words"][1].values.astype(np.uint8)) == b"tench, Tinca tinca"


KAGGLE = """ImageId,PredictionString
ILSVRC2012_val_00000001,n02102040 0 0 223 223 n02102040 1 2 3 4
ILSVRC2012_val_00000002,n01440764 0 0 223 223
"""
TEXT = (
    "\ufeffILSVRC2012_val_00000001.JPEG\tn02102040\r\n\nval/ILSVRC2012_val_00000002.JPEG n01440764"
)


@pytest.mark.parametrize("text", [KAGGLE, TEXT])
def test_texts(text: str, tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")
    wnids = read_labels(path)
    assert wnids == {
        "ILSVRC2012_val_00000001": "n02102040",
        "ILSVRC2012_val_00000002": "n01440764",
    }
    files = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    classes, labels = labels_of(files, wnids, "x")
    assert classes == ("n01440764", "n02102040") and labels.tolist() == [1, 0]
    with pytest.raises(
        RunError, match=r"1 of the 3 images of x have no label, for instance z\.jpg"
    ):
        labels_of([*files, "z.jpg"], wnids, "x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.jpg 7", "line 1: the class is the number 7"),
        ("a.jpg", "not an image and a class"),
        ("a.jpg x\na.png y", "line 2: a has two classes"),
        ("a.jpg ../x", "cannot be the name of a class"),
        ("ImageId,PredictionString\n", "holds no labels"),
        ("\udcff\udcfe", "is no label file"),
    ],
)
def test_wrong_texts(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UsageError, match=reason):
        read_labels(path)

"""`predict`: names, order, the image, and what it refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.images.imagenet import imagenet_names
from ffcv_imnet.tools import predict
from tests.pictures import picture


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A network whose guesses are known: the bias alone decides."""
    network = tv.squeezenet1_1(num_classes=1000)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.classifier[1].bias[[7, 0, 999, 500, 388]] = torch.tensor([9.0, 8, 7, 6, 5])
    torch.save(network.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_five_names_in_order(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = []
    for seed in range(2):
        photos.append(str(tmp_path / f"photo{seed}.jpg"))
        Image.fromarray(picture(seed)).save(photos[-1])
    options = [
        "--weights",
        str(weights),
        "--arch",
        "squeezenet1_1",
        "--out",
        str(tmp_path / "p.png"),
    ]
    table = tmp_path / "p.csv"
    assert predict.main([*photos, *options, "--csv", str(table)]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [photo for photo in photos for _ in range(5)]
    assert [int(row["rank"]) for row in rows] == [1, 2, 3, 4, 5] * 2
    assert rows[0]["class"].startswith(f"{list(imagenet_names())[7]} ")
    shown = capsys.readouterr().out
    ids = list(imagenet_names())
    places = [shown.index(f"{ids[i]} {imagenet_names()[ids[i]]}") for i in (7, 0, 999, 500, 388)]
    assert places == sorted(places) and "n01440764 tench" in shown
    exponents = np.exp([9.0, 8, 7, 6, 5])
    assert f"{exponents[0] / (exponents.sum() + 995):.4f}" in shown
    assert float(rows[0]["probability"]) == pytest.approx(
        exponents[0] / (exponents.sum() + 995), abs=1e-5
    )
    assert all(photo in shown for photo in photos)
    with Image.open(tmp_path / "p.png") as drawn:
        assert drawn.format == "PNG" and drawn.height > 400


def test_mistakes_are_one_line(weights: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(1)).save(tmp_path / "good.jpg")
    (tmp_path / "text.md").write_text("# no weights\n")
    options = ["--weights", str(weights)]
    good = str(tmp_path / "good.jpg")
    with pytest.raises(UsageError, match=r"x\.jpg: its name must end in \.png$"):
        predict.main([good, *options, "--out", str(tmp_path / "x.jpg")])
    with pytest.raises(UsageError, match="name its network with --arch"):
        predict.main([good, *options])
    with pytest.raises(RunError, match=r"text\.md is no file of weights"):
        predict.main([good, "--weights", str(tmp_path / "text.md")])
    state = {key: value.to(torch.complex64) for key, value in torch.load(weights).items()}
    torch.save(state, tmp_path / "complex.pth")
    with pytest.raises(RunError, match=r"complex.pth: \S+ is not of floating-point numbers$"):
        predict.main([good, "--weights", str(tmp_path / "complex.pth"), "--arch", "squeezenet1_1"])
    with pytest.raises(UsageError, match="does not take 8 px"):
        predict.main([good, *options, "--arch", "squeezenet1_1", "--resolution", "8"])


def test_a_bad_photograph_does_not_stop_the_others(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 no")
    Image.fromarray(picture(1)).save(tmp_path / "good.jpg")
    photos = [str(tmp_path / name) for name in ("bad.jpg", "none.jpg", "good.jpg")]
    assert predict.main([*photos, "--weights", str(weights), "--arch", "squeezenet1_1"]) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 2 and all("the image cannot be read" in line for line in lines)
    assert "bad.jpg" in lines[0] and "none.jpg" in lines[1]
    assert photos[2] in said.out and photos[0] not in said.out


def test_a_folder_is_its_images(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of its folders too; and a table is replaced only by another of the same kind that has rows."""
    for name in ("a/1.jpg", "b/c/2.PNG"):
        (tmp_path / "d" / name).parent.mkdir(parents=True)
        Image.fromarray(picture(1)).save(tmp_path / "d" / name)
    (tmp_path / "d/notes.txt").touch()
    options = ["--weights", str(weights), "--arch", "squeezenet1_1", "--csv"]
    table, mine = tmp_path / "out.csv", tmp_path / "mine.csv"
    assert predict.main([str(tmp_path / "d"), *options, str(table)]) == 0
    said = table.read_text()
    assert "a/1.jpg" in said and "b/c/2.PNG" in said and "notes" not in said
    assert predict.main([str(tmp_path / "none.jpg"), *options, str(table)]) == 1
    assert table.read_text() == said
    mine.write_text("file,label\na.jpg,cat\n")
    with pytest.raises(UsageError, match="not a table of predictions: name another file"):
        predict.main([str(tmp_path / "d"), *options, str(mine)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="a folder without images"):
        predict.main([str(tmp_path / "empty"), *options, str(table)])


@pytest.mark.filterwarnings("error")
def test_a_image_with_any_letters(tmp_path: Path) -> None:
    """No missing-glyph warning, and no name is taken for TeX."""
    names = ("кошка", "猫", "🐈", "$\\frac$ {", "x" * 500)
    guesses = [(0.2, name) for name in names]
    predict.draw([predict.Named(tmp_path / "$a$ 猫.jpg", picture(1), guesses)], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as drawn:
        assert drawn.size == (1080, 312)

"""The generated data set: the same for ever, an ImageFolder tree, and beyond a linear classifier."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.images.synthetic import CLASSES, COMPLETE, draw, write_tree


def pixels(split: int, per_class: int, side: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Images as rows of numbers about zero, and their class indices."""
    rows, labels = [], []
    for class_index in range(len(CLASSES)):
        for i in range(per_class):
            small = draw(class_index, (0, split, i)).resize((side, side), Image.Resampling.BOX)
            rows.append(np.asarray(small, dtype=np.float64).ravel() / 255 - 0.5)
            labels.append(class_index)
    return np.stack(rows), np.asarray(labels)


def test_a_image_depends_on_its_key_alone() -> None:
    first = draw(3, (0, 1, 7))
    draw(4, (0, 1, 8))
    assert first.tobytes() == draw(3, (0, 1, 7)).tobytes()
    others = [draw(3, (0, 1, 8)), draw(3, (0, 0, 7)), draw(3, (1, 1, 7)), draw(4, (0, 1, 7))]
    assert len({first.tobytes(), *(other.tobytes() for other in others)}) == 5


def test_images_are_small_rgb_of_varying_size() -> None:
    sizes = {draw(i % 10, (0, 0, i)).size for i in range(60)}
    assert len(sizes) > 30
    assert all(72 <= width <= 96 and 64 <= height <= 80 for width, height in sizes)
    picture = draw(0, (0,), size=(40, 50))
    assert (picture.mode, picture.size) == ("RGB", (40, 50))


def test_a_shape_may_be_lighter_or_darker_than_what_lies_behind_it() -> None:
    lightness = [np.asarray(draw(1, (0, 0, i)).convert("L"), dtype=float) for i in range(60)]
    # A circle: the image's extreme corners lie behind it, its brightest or darkest half is it.
    lighter = [(p > p[:6, :6].mean() + 40).mean() > 0.15 for p in lightness]
    assert 15 < sum(lighter) < 45


def test_a_linear_classifier_on_pixels_cannot() -> None:
    """Ridge regression, in closed form, over strengths: chance is 0.10; 0.17 was seen at its best."""
    train, labels = pixels(0, 80, 16)
    val, answers = pixels(1, 40, 16)
    wanted = np.eye(len(CLASSES))[labels] - 1 / len(CLASSES)
    for strength in (10.0, 1000.0):
        inverse = np.linalg.inv(train.T @ train + strength * np.eye(train.shape[1]))
        guesses = (val @ (inverse @ train.T @ wanted)).argmax(axis=1)
        assert (guesses == answers).mean() < 0.25


def test_the_tree_is_an_image_folder(tmp_path: Path) -> None:
    root = tmp_path / "shapes"
    assert write_tree(root, 2, 1, seed=5)
    assert not root.with_name("shapes.partial").exists()
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*.jpg"))
    expected = [f"train/{c}/{c}_{i:05d}.jpg" for c in CLASSES for i in range(2)]
    expected += [f"val/{c}/{c}_00000.jpg" for c in CLASSES]
    assert names == sorted(expected)
    assert sorted(CLASSES) == list(CLASSES)  # the class index is ImageFolder's
    stored = np.asarray(Image.open(root / "val" / CLASSES[9] / f"{CLASSES[9]}_00000.jpg"), float)
    drawn = np.asarray(draw(9, (5, 1, 0)), float)
    assert np.abs(stored - drawn).mean() < 6  # what JPEG at quality 95 loses


def test_a_whole_tree_is_left_and_another_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "shapes"
    write_tree(root, 1, 1)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")}
    assert not write_tree(root, 1, 1)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*.jpg")}
    assert write_tree(root, 2, 1)
    assert len(list(root.rglob("*.jpg"))) == 30


def test_what_an_interrupted_run_left_is_drawn_anew(tmp_path: Path) -> None:
    leftover = tmp_path / "shapes.partial" / "train" / "rubbish"
    leftover.mkdir(parents=True)
    assert write_tree(tmp_path / "shapes", 1, 1)
    assert not (tmp_path / "shapes" / "train" / "rubbish").exists()


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a tree of shapes"):
        write_tree(tmp_path / "shapes", 1, 1)
    assert (tmp_path / "shapes" / "letter.txt").exists()
    assert not (tmp_path / "shapes" / COMPLETE).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_mark_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / COMPLETE).write_text(text)
    with pytest.raises(UsageError, match="is not a tree of shapes"):
        write_tree(tmp_path, 1, 1)
    assert (tmp_path / COMPLETE).exists()

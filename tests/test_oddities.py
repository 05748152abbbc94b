"""Nothing odd in a folder of images goes unseen: passed over and counted, named, or refused."""

import os
import re
import time
from pathlib import Path

import pytest

import write_ffcv
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.names import fault_of, quoted, shown
from ffcv_imnet.images.flat import FlatFolder
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.imagenet import write_labels
from ffcv_imnet.images.labels import read_labels
from ffcv_imnet.images.merged import Merged
from ffcv_imnet.images.remarks import check_classes, notes, oddities
from ffcv_imnet.images.sources import open_source, open_undivided
from ffcv_imnet.report.html import escape


def tree(root: Path, *files: str) -> Path:
    """Empty files: reading them is not what is tested."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DATA/train with two classes of two images."""
    return tree(tmp_path / "train", "cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg")


def names(found: ImageFolderTree) -> list[str]:
    return [found.name(index) for index in range(len(found))]


PLAIN = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]


def only_oddity(root: Path) -> str:
    (odd,) = oddities(ImageFolderTree(root))
    assert "\n" not in odd
    return odd


def test_what_computers_leave_behind_is_passed_over_and_counted(root: Path) -> None:
    left = [
        ".ipynb_checkpoints/0-checkpoint.jpg",
        "__MACOSX/cat/0.jpg",
        "@eaDir/x.jpg",
        ".DS_Store",
    ]
    left += [
        f"cat/{name}"
        for name in ("._0.jpg", "Thumbs.db", ".ipynb_checkpoints/x.jpg", "desktop.ini")
    ]
    tree(root, *left)
    (root / "lost+found").mkdir()
    found = ImageFolderTree(root)
    assert found.classes == ("cat", "dog") and names(found) == PLAIN
    assert found.ignored == 0 and not oddities(found)
    assert [note.split(" ")[0] for note in notes(found)] == ["9"]


def test_links_in_a_circle_end_and_are_named(root: Path) -> None:
    (root / "cat/a").symlink_to(".")
    (root / "cat/b").symlink_to(".")
    (root / "cat/up").symlink_to("..")
    (root / "cat/top").symlink_to("../..")
    found = ImageFolderTree(root)
    assert names(found) == PLAIN and not oddities(found)
    assert sum("leads by a link back to" in note for note in notes(found)) == 4


def test_a_link_to_another_disk_is_followed_once(root: Path, tmp_path: Path) -> None:
    tree(tmp_path / "disk", "more/2.jpg", "more/deep/3.jpg")
    (root / "cat/z").symlink_to(tmp_path / "disk/more")
    (root / "cat/y").symlink_to(tmp_path / "disk")  # holds what z leads to
    found = ImageFolderTree(root)
    cats = ["cat/0.jpg", "cat/1.jpg", "cat/y/more/2.jpg", "cat/y/more/deep/3.jpg"]
    assert names(found) == [*cats, *PLAIN[2:]] and len(notes(found)) == 1


def test_a_folder_of_two_classes_is_odd(root: Path) -> None:
    (root / "hound").symlink_to("dog")
    assert "hound is also a folder of class dog, so that its images have two" in only_oddity(root)
    (root / "hound").unlink()
    (root / "cat/x").symlink_to("../dog")
    assert "is also a folder of class" in only_oddity(root)


def test_broken_links_are_named(root: Path) -> None:
    (root / "eel").symlink_to("/mnt/not_mounted/eel")
    assert "train/eel is a link that leads nowhere, to /mnt/not_mounted/eel" in only_oddity(root)
    (root / "eel").rename(root / "cat/eel")
    assert "train/cat/eel is a link that leads nowhere" in only_oddity(root)
    (root / "cat/eel").rename(
        root / "cat/eel.jpg"
    )  # an image that cannot be read, said when it is read
    assert len(ImageFolderTree(root)) == 5 and not oddities(ImageFolderTree(root))
    (root / "self").symlink_to("self")
    assert "train/self is a link that leads nowhere" in only_oddity(root)


def test_a_mistake_of_level_is_asked_about(tmp_path: Path) -> None:
    for inside, remedy in (("train", "name {} as the folder"), ("images", "to lie in {} itself")):
        root = tmp_path / inside / "train"
        tree(root, f"{inside}/cat/0.jpg", f"{inside}/dog/0.jpg")
        odd = only_oddity(root)
        assert f"({inside}/ has cat, dog): if the classes lie one level deeper" in odd
        assert remedy.format(root) in odd
    parts = tree(tmp_path / "parts", "part1/cat/0.jpg", "part1/dog/0.jpg", "part2/cat/0.jpg")
    assert "one level deeper" in only_oddity(parts)
    one = tree(tmp_path / "one", "cat/0.jpg", "cat/more/1.jpg")
    assert "one class only, cat, and nothing to tell it from" in only_oddity(one)
    # tiny-imagenet-200: every class has one folder of images.
    assert not oddities(
        ImageFolderTree(tree(tmp_path / "tiny", "n1/images/0.jpg", "n2/images/0.jpg"))
    )


def test_images_beside_the_classes_are_named(root: Path) -> None:
    tree(root, "stray.jpg", "list.csv")
    assert "1 images lie beside the class folders of" in only_oddity(root)


def test_classes_that_differ_only_in_writing(root: Path) -> None:
    tree(root, "Cat/0.jpg", "caf\u00e9/0.jpg", "cafe\u0301/0.jpg")
    assert (
        "differ only in how their names are written: Cat, cafe\u0301, caf\u00e9, cat"
        in only_oddity(root)
    )


@pytest.mark.parametrize("pair", [("1", "001"), ("ab", "a\u200bb"), ("space", "space ")])
def test_classes_that_look_alike(tmp_path: Path, pair: tuple[str, str]) -> None:
    odd = only_oddity(tree(tmp_path, *(f"{name}/0.jpg" for name in pair)))
    assert odd.startswith("these classes differ only in how their names are written")


def test_classes_that_are_the_parts_of_a_data_set(tmp_path: Path) -> None:
    odd = only_oddity(tree(tmp_path, "Train/0.jpg", "val/0.jpg"))
    assert f"the classes of {tmp_path} would be Train, val: they seem to lie" in odd


def test_images_of_other_suffixes(root: Path) -> None:
    tree(root, "cat/a.jfif", "cat/b.JPE", "cat/notes.txt", "cat/c.xyz", "cat/boxes.xml")
    found = ImageFolderTree(root)
    assert len(found) == 6 and found.ignored == 3 and not oddities(found)
    tree(root, "dog/x.heic", "dog/y.JXL")
    (root / "dog/noname").write_bytes(b"\xff\xd8\xff\xe0")
    (root / "dog/film").write_bytes(b"\0\0\0\x18ftypisom")  # a film, not an image
    os.mkfifo(root / "dog/pipe")
    odd = only_oddity(root)
    assert odd.startswith("3 images not read for their suffix")
    assert (
        "1 .heic" in odd
        and "1 without suffix" in odd
        and "read them after `pip install pillow-heif`" in odd
    )
    for path in (root / "cat").iterdir():
        path.unlink()
    tree(root, "cat/x.heic")
    with pytest.raises(UsageError, match=r"hold no image: cat; .*; 4 images not read"):
        ImageFolderTree(root)


def test_a_flat_folder_too(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg", "b.jpg", "._a.jpg", "Thumbs.db", "c.heic")
    found = FlatFolder(tmp_path, {"a": "ant", "b": "bee"})
    assert (
        len(found) == 2
        and "1 .heic" in oddities(found)[0]
        and notes(found)[0].startswith("2 files")
    )


def test_a_label_files_classes_that_look_alike(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    found = FlatFolder(tmp_path, {"a": "Dog", "b": "dog", "c": "cat"})
    said = ["these classes differ only in how their names are written: Dog, dog"]
    assert oddities(found) == said
    trees = [tree(tmp_path / "1", "Dog/a.jpg", "cat/b.jpg"), tree(tmp_path / "2", "dog/c.jpg")]
    assert oddities(Merged([ImageFolderTree(root) for root in trees])) == said


def test_images_without_a_label(tmp_path: Path) -> None:
    flat = tree(tmp_path / "flat", "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    (labels := tmp_path / "labels.csv").write_text("file,label\na.jpg,ant\nb.jpg,bee\n")
    said = f"2 of the 4 images of {flat} have no label, for instance c.jpg, d.jpg"
    with pytest.raises(RunError, match=re.escape(said)):
        FlatFolder(flat, read_labels(labels))
    of_another_split = open_source("train", [flat], labels=labels)
    assert (notes(of_another_split), oddities(of_another_split)) == ([f"{said}: left out"], [])
    undivided = open_undivided([flat], labels)  # there is no other split to which they belong
    assert (notes(undivided), oddities(undivided)) == ([], [f"{said}: left out"])
    split = tree(tmp_path / "split", "train/a.jpg", "train/x.jpg")
    both = open_undivided([split, flat], labels)
    of_train = f"1 of the 2 images of {split / 'train'} have no label, for instance x.jpg"
    assert (notes(both), oddities(both)) == ([], [f"{of_train}: left out", f"{said}: left out"])


def test_numbers_as_classes_are_said_to_be_in_the_order_of_text(tmp_path: Path) -> None:
    found = ImageFolderTree(tree(tmp_path, *(f"{n}/0.jpg" for n in range(11))))
    (note,) = notes(found)
    assert "output 2 of the network is class 10 " in note
    assert not notes(ImageFolderTree(tree(tmp_path / "few", *(f"{n}/0.jpg" for n in range(10)))))


BAD_NAMES = {
    b"caf\xe9": r"is not UTF-8, b'caf\\xe9': rename",
    b"two\nlines": r"control characters or line breaks, 'two\\nlines': rename",
    b"a\ttab": "control characters",
    b"\x1b[31mred": "control characters",
    "\u202egnp.exe".encode(): "control characters",
    "a\u2028b".encode(): "control characters",
    b"  ": "is empty",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be_stored_or_shown(root: Path, name: bytes) -> None:
    (root / "dog").rename(root / os.fsdecode(name))
    with pytest.raises(UsageError, match=BAD_NAMES[name]) as caught:
        ImageFolderTree(root)
    str(caught.value).encode()  # can itself be printed
    assert "\n" not in str(caught.value)


def test_names_that_can() -> None:
    for name in (
        "n01440764",
        "space ",
        "-dash",
        "a,comma",
        "🦊",
        "café",
        "猫",
        "👩‍🔬",
        "a&b<c>",
        "q'\"",
    ):
        assert fault_of(name) is None and shown(name) == name
    assert (
        fault_of(None) == "is not text" and fault_of("x" * 501) == "is longer than 500 characters"
    )
    assert shown("caf\udce9\n\u202e") == r"caf\xe9\n\u202e"
    assert quoted("x" * 500) == "'" + "x" * 76 + "..." and quoted("\ud800") == "b'?'"


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_much_of_anything_is_quoted_by_its_beginning(kind: type) -> None:
    started = time.process_time()
    assert quoted([kind(10**8)]).endswith("...") and time.process_time() - started < 0.2


def test_writing_stops_at_an_oddity_unless_it_is_allowed(root: Path, tmp_path: Path) -> None:
    (root / "eel").symlink_to("/mnt/not_mounted/eel")
    words = ["--split", "train", "--data_dir", str(tmp_path), "--out_dir", str(tmp_path / "b")]
    with pytest.raises(
        UsageError, match=r"leads nowhere.*; mend that, or go on all the same with --allow_odd"
    ):
        write_ffcv.plan(write_ffcv.parse(words))
    (job,) = write_ffcv.plan(write_ffcv.parse([*words, "--allow_odd"]))
    assert len(job.source) == 4 and "leads nowhere" in job.remarks[0]
    assert not (tmp_path / "b").exists()


def test_a_class_twice_in_another_kind_of_source(root: Path) -> None:
    source = ImageFolderTree(root)
    source.classes = ("cat", "cat")
    with pytest.raises(UsageError, match="has 'cat' twice"):
        check_classes(source)


def test_pages_and_label_files_escape_what_a_line_does_not_show() -> None:
    """Of logs and checkpoints that were not made here; our own have no such names."""
    name = "<b>two\nlines\u202e\x1b"
    assert escape(name) == r"&lt;b&gt;two\nlines\u202e\x1b"
    assert write_labels([name, "cat"]).splitlines() == [r"<b>two\nlines\u202e\x1b", "cat"]

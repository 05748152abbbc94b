"""Files that cost more than they have bytes: each reader refuses them in a sentence, at once."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ffcv_imnet.core.bounded import in_words, read_at_most
from ffcv_imnet.core.errors import RunError
from ffcv_imnet.core.names import quoted
from ffcv_imnet.images.notes import read_notes
from ffcv_imnet.train import checkpoint
from tests.fuzz.readers import fuzz


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"12345")
    assert read_at_most(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes") as caught:
        read_at_most(path, 4)
    assert caught.value.strerror == "it has more than 4 bytes"
    with pytest.raises(OSError, match="it is a device"):
        read_at_most(Path("/dev/zero"), 1)
    assert [in_words(n) for n in (5, 1 << 10, 3 << 20, 2 << 30)] == [
        "5 bytes",
        "1 kB",
        "3 MB",
        "2 GB",
    ]


def test_a_message_shows_a_line_of_what_is_endless() -> None:
    twice: list[Any] = [1]
    for _ in range(60):
        twice = [twice, twice]
    itself: list[Any] = []
    itself.append(itself)
    for value in (10**5000, twice, itself, "a" * 10**6, {"a": twice}, torch.zeros(3, 1000)):
        assert len(quoted(value)) <= 80


# ---- what torch.save writes ---------------------------------------------------------------------


class Calls:
    """Pickled, calls `function` when it is read."""

    def __init__(self, function: Callable[..., Any], *values: Any) -> None:
        self.function, self.values = function, values

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.values


def zipped(parts: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in parts:
            archive.writestr(name, data)
    return file.getvalue()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def endless() -> list[Any]:
    twice: list[Any] = [1]
    for _ in range(40):
        twice = [twice, twice]
    return twice


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (zipped([("a/data.pkl", bytes(10**6))], zipfile.ZIP_DEFLATED), "are compressed"),
        (zipped([("a", b"N."), ("b", b"N.")]).replace(b"b", b"a"), "two parts named"),
        (saved(Calls(bytearray, 10**15)), "asks for more than 1 GB"),
        (pickle.dumps(Calls(bytearray, 10**15), protocol=2), "asks for more than 1 GB"),
        (saved(endless()), "more than 1,000,000 values"),
        (saved({"a": torch.zeros(1).expand(10**12)}), "more numbers than it has"),
        (saved({"a": torch.zeros(9, 9).to_sparse()}), "sparse"),
        (saved({"a": torch.zeros(9, device="meta")}), "without numbers"),
    ],
)
def test_no_pickle_costs_more_than_its_file(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(data)
    with pytest.raises(RunError, match=reason) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_of_a_zip_lie_apart(tmp_path: Path) -> None:
    data = bytearray(zipped([("a", bytes(1000)), ("b", bytes(1000))]))
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)  # its place: that of the first
    (path := tmp_path / "last.pt").write_bytes(data)
    assert "lie over each other" in str(checkpoint.damage_of(path))


# ---- what export noted --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("classes", "5", "has 5 as its classes"),
        ("classes", '["a", "a"]', "has 'a' twice"),
        ("classes", "[" * 10**5, "is not JSON"),
        ("resolution", '"x"', "has 'x' as its resolution"),
        ("resolution", "0", "has 0 as its resolution"),
        ("crop_ratio", "NaN", "has nan as its crop_ratio"),
        ("interpolation", '"magic"', "has 'magic' as its interpolation"),
        ("mean", "[1]", "as its mean"),
        ("std", "[1, 1, 0]", "as its std"),
        ("arch", "{}", "as its arch"),
    ],
)
def test_notes_are_checked_before_they_are_believed(key: str, text: str, reason: str) -> None:
    assert read_notes({"ffcv_imnet.arch": "null", "format": "pt"}) == {}
    with pytest.raises(ValueError, match=reason):
        read_notes({"ffcv_imnet." + key: text})


@pytest.mark.parametrize("what", ["labels", "mats", "images"])
def test_some_mutated_files(what: str) -> None:
    """`python -m tests.fuzz WHAT` goes on where this stops."""
    seed = int.from_bytes(os.urandom(4))
    assert set(fuzz(what, cases=60, seed=seed)) <= {"read", "refused"}, seed

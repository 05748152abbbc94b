"""A manifest is believed in nothing: every field is checked, in one sentence that names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data.manifest import LARGEST, Manifest
from tests.fuzz.forge import write_sound
from tests.fuzz.manifests import fuzz


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("sound") / "train.beton"
    write_sound(path)
    fields: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return fields


FAULTS: list[tuple[str, Any, str]] = [
    ("classes", None, "'classes' is not a list of names"),
    ("classes", 3, "'classes' is not a list of names"),
    ("classes", [], "'classes' is not a list of names"),
    ("classes", ["ant", "ant", "bee"], "'classes' has 'ant' twice"),
    ("classes", ["ant", "", "bee"], "'classes' has a name that is empty, '' at place 1"),
    ("classes", ["ant", 7, "bee"], "'classes' has a name that is not text, 7 at place 1"),
    ("classes", ["ant", "b\ne", "c"], r"control characters or line breaks, 'b\ne' at place 1"),
    ("classes", ["ant", "b\ud800", "c"], "not UTF-8"),
    ("classes", ["ant", "bee"], "'class_counts' has 3 counts of 2 'classes'"),
    ("bytes", "82133", "'bytes' is '82133', not a count"),
    ("bytes", True, "'bytes' is True, not a count"),
    ("samples", 13, "'class_counts' add up to 12 and 'samples' is 13"),
    ("samples", 0, "'samples' is 0"),
    ("samples", 10**400, "not a count"),
    ("class_counts", [4, 4.0, 4], "'class_counts' is 4.0, not a count"),
    ("class_counts", [-4, 8, 8], "'class_counts' is -4, not a count"),
    ("content_checksum", "sha256:" + "0" * 63, "not sha256: and 64 hexadecimal digits"),
    ("tables_checksum", None, "'tables_checksum' is None, not sha256:"),
    ("split", "tr\x1bain", "'split' is "),
    ("settings", [1], r"'settings' is [1], not a mapping"),
    ("settings", {"a": []}, "'settings' has 'a', which is neither a number nor text"),
    ("settings", {"a": float("inf")}, "it has Infinity, which is no number of JSON"),
    ("source", {"kind": "two\nlines"}, "'source' has 'kind', which has control characters"),
    ("skipped", [{"path": 1, "reason": "x"}], "'skipped' has an entry that is not text"),
    ("skipped", ["x"], "'skipped' has an entry that is not a path and a reason"),
    ("versions", {"numpy": 2}, "'versions' has a version that is not text"),
    ("created", "yesterday", "'created' is 'yesterday', not a time of ISO 8601"),
    ("format", True, "not a manifest of format 1"),
    ("more", 1, "lacks or misnames 'more'"),
]


def refusal(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        Manifest.load(path)
    text = str(caught.value)
    assert (
        "\n" not in text and len(text) < 700 and str(path) in text and "write it again with" in text
    )
    text.encode()  # can be printed
    return text


@pytest.mark.parametrize(("key", "value", "reason"), FAULTS)
def test_a_wrong_field_is_named(
    key: str, value: Any, reason: str, sound: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**sound, key: value}))
    assert reason in refusal(path)


TEXTS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "nested": (lambda text: b'{"a":' * 100_000, "is nested too deeply"),
    "nested lists": (lambda text: b"[" * 100_000, "is nested too deeply"),
    "a key twice": (
        lambda text: text.replace("{", '{"split": "val",', 1).encode(),
        "'split' twice",
    ),
    "too long": (lambda text: b" " * LARGEST + text.encode(), "is larger than 32 MB"),
    "digits": (lambda text: b'{"format": ' + b"1" * 5000 + b"}", "cannot be read"),
    "a list": (lambda text: b"[]", "is not a manifest of format 1"),
    "nothing": (lambda text: b"", "cannot be read"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_none(name: str, sound: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(TEXTS[name][0](json.dumps(sound)))
    assert TEXTS[name][1] in refusal(path)


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.json")  # nobody writes into it
    assert "it is a pipe" in refusal(tmp_path / "train.json")
    with pytest.raises(UsageError, match="does not exist"):
        Manifest.load(tmp_path / "val.json")


def test_mutated_manifests() -> None:
    """`python -m tests.fuzz manifests` goes on where this stops."""
    counts = fuzz(cases=300, seed=int.from_bytes(os.urandom(4)))
    assert counts["accepted"] > 0 and counts["refused"] > 0

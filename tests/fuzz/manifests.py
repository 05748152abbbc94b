"""Mutated manifests beside a sound .beton: each is read rightly, or refused in one sentence."""

import copy
import json
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.data.beton import check_beton, read_tables
from ffcv_imnet.data.manifest import Manifest, manifest_path
from tests.fuzz.forge import write_sound

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 12, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", " ", "x", "7",
    "two\nlines", "tab\t", "nul\0", "\x1b[31mred", "caf\udce9", "\ud800", "\u202egnp", "\u2028", "é", "🦊",
    "a" * 5000, [], [[]], ["ant"], ["ant", "ant", "bee"], ["ant", "", "bee"], ["ant", None, 3],
    ["ant", "bee"], ["a", "b", "c", "d"], [4, 4, 4], [4, 4], [5, 4, 3], [12, 0, 0], [-4, 8, 8], [4.0, 4, 4],
    {}, {"": 1}, {"a": {"b": []}}, {"a\nb": 1}, {"path": "x"}, [{"path": "x", "reason": "y"}],
    [{"path": 1, "reason": None}], "sha256:", "sha256:" + "0" * 64, "sha256:" + "F" * 64, "md5:" + "0" * 32,
    "2026-01-01", "yesterday",
]  # fmt: skip
TEXTS = [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"//", b"'", b"\xff",
         b"\xef\xbb\xbf", b"\0", b",", b"}", b'"', b"\\ud800", b"\n", b"null", b"0x10", b"01"]  # fmt: skip


def mutated(fields: dict[str, Any], rng: np.random.Generator) -> bytes:
    """The manifest's text after one to three changes of values, keys or bytes."""
    fields = json.loads(json.dumps(fields))
    for _ in range(int(rng.integers(0, 3))):
        _change_value(fields, rng)
    text = bytearray(json.dumps(fields, indent=1).encode())
    for _ in range(int(rng.integers(0, 3))):
        at, kind = int(rng.integers(len(text) + 1)), int(rng.integers(5))
        if kind == 0:
            text[at:at] = TEXTS[int(rng.integers(len(TEXTS)))]
        elif kind == 1:
            del text[at : at + int(rng.integers(1, 40))]
        elif kind == 2 and at < len(text):
            text[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:  # a key twice, or a part
            part = text[at : at + int(rng.integers(1, 200))]
            text[at:at] = part
        elif kind == 4 and rng.random() < 0.2:
            del text[at:]
    return bytes(text)


def _change_value(fields: dict[str, Any], rng: np.random.Generator) -> None:
    key = str(rng.choice(sorted(fields))) if fields else "format"
    value = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
    held, kind = fields.get(key), int(rng.integers(6))
    if kind == 0:
        fields.pop(key, None)
    elif kind == 1:
        fields[str(value)[:20]] = value
    elif kind == 2 and isinstance(held, list):
        held.insert(int(rng.integers(len(held) + 1)), value)
    elif kind == 3 and isinstance(held, list) and held:
        held[int(rng.integers(len(held)))] = value
    elif kind == 3 and isinstance(held, dict):
        held[str(value)[:20]] = value
    else:
        fields[key] = value


def is_text(value: Any) -> bool:
    """Not empty, and every character can be stored and shown on one line."""
    return (
        isinstance(value, str)
        and bool(value.strip())
        and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value)
        and not any("\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" for c in value)
    )


def wrong(said: Manifest, labels: list[int]) -> str | None:
    """An independent look at an accepted manifest; what of it must not have been accepted."""
    names, counts = list(said.classes), list(said.class_counts)
    numbers = [said.format, said.samples, said.bytes, *counts]
    checks = {
        "numbers": all(type(n) is int and n >= 0 for n in numbers),
        "classes": bool(names) and all(map(is_text, names)) and len(set(names)) == len(names),
        "counts": counts == [labels.count(label) for label in range(len(names))],
        "samples": said.samples == len(labels),
        "checksums": all(
            len(c) == 71 and c[:7] == "sha256:" and set(c[7:]) <= set("0123456789abcdef")
            for c in (said.content_checksum, said.tables_checksum)
        ),
        "lines": is_text(said.split) and is_text(said.created),
        "mappings": all(type(m) is dict for m in (said.settings, said.source, said.versions)),
        "skipped": all(set(entry) == {"path", "reason"} for entry in said.skipped),
    }
    return next((name for name, right in checks.items() if not right), None)


def fuzz(cases: int, seed: int) -> dict[str, int]:
    """Mutate `cases` times; counts of what came out.

    Raises:
        AssertionError: a manifest was accepted that is none, or refused in other than a sentence.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "train.beton"
        write_sound(path)
        labels = read_tables(path).labels.tolist()
        place = manifest_path(path)
        fields = json.loads(place.read_text())
        for case in range(cases):
            place.write_bytes(mutated(fields, np.random.default_rng([seed, case])))
            try:
                said = check_beton(path)
            except (RunError, UsageError) as error:
                text = str(error)
                assert "\n" not in text and len(text) < 1000 and str(place) in text, (case, text)
                assert text.isprintable() or "é" in text, (case, text)
                counts["refused"] += 1
                continue
            fault = wrong(said, labels)
            assert fault is None, f"seed {seed}, case {case}: accepted with wrong {fault}"
            counts["accepted"] += 1
    return dict(counts)

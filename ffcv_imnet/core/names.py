"""Names that others gave: which of them may be stored, and how any of them is shown.

A class name ends up in a manifest, a checkpoint, labels.txt (a class a line), HTML and a terminal. One
that breaks a line there, cannot be encoded or turns the text around it is refused where it is first seen.
"""

import os
import reprlib
import unicodedata
from collections import Counter
from typing import Any

LONGEST = 500  # characters
# Text after one of these is shown right to left, or out of order ("Trojan Source", arXiv:2111.00169).
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
UNSHOWN = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line and paragraph separators


def fault_of(name: object) -> str | None:
    """What keeps `name` from naming a class, to follow its mention; None if nothing does."""
    if not isinstance(name, str):
        return "is not text"
    if not name.strip():
        return "is empty"
    if len(name) > LONGEST:
        return f"is longer than {LONGEST} characters"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "is not UTF-8"
    if not all(map(_showable, name)):
        return "has control characters or line breaks"
    return None


def fault_of_all(names: object) -> str | None:
    """What is wrong with a list of class names; None if nothing is."""
    if not isinstance(names, (list, tuple)) or not names:
        return "is not a list of names"
    for index, name in enumerate(names):
        if fault := fault_of(name):
            return f"has a name that {fault}, {quoted(name)} at place {index:,}"
    if len(set(names)) < len(names):
        return f"has {quoted(Counter(names).most_common(1)[0][0])} twice"
    return None


def number_of(count: int, noun: str) -> str:
    """`1 epoch`, `2,000 epochs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shown(name: str) -> str:
    """`name` on one line of a terminal: what cannot be shown there as its bytes or code, escaped."""
    return "".join(c if _showable(c) else _escaped(c) for c in name)


def shown_lines(text: str) -> str:
    """Lines that hold words of a file from outside, each as `shown` has it."""
    return "\n".join(map(shown, text.split("\n")))


def quoted(value: object) -> str:
    """Any value in a message: on one line, cut to what a line holds; bytes where text was not UTF-8."""
    if isinstance(value, str) and fault_of(value[:LONGEST]) == "is not UTF-8":
        text = repr(value.encode(errors="surrogateescape" if _from_bytes(value) else "replace"))
    else:
        text = shown(_said.repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


class _Said(reprlib.Repr):
    """`repr`, of at most a line's worth of what may be gigabytes, nest without end or hold itself."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 1 << 256 else "a number of more than 70 digits"

    def repr_bytes(self, x: bytes | bytearray, level: int) -> str:
        return repr(x[: self.maxother])

    repr_bytearray = repr_bytes

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            return repr(x)
        except Exception:  # of any class, which may hold anything
            return f"<{type(x).__name__}>"


_said = _Said()
_said.maxstring = _said.maxother = 200


def _showable(character: str) -> bool:
    if " " <= character <= "~":
        return True
    return character not in TURNING and unicodedata.category(character) not in UNSHOWN


def _from_bytes(name: str) -> bool:
    # What os.fsdecode makes of bytes that are not UTF-8; other surrogates come from JSON's \\ud800.
    return all("\udc80" <= c <= "\udcff" for c in name if "\ud800" <= c <= "\udfff")


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{os.fsencode(character).hex()}"
    return character.encode("unicode_escape").decode()

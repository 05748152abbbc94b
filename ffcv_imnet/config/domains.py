"""What values a setting may have: each domain checks a value from YAML or the command line."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastargs.validation import Checker

from ffcv_imnet.config.strict_yaml import StrictError, load_yaml
from ffcv_imnet.core.errors import UsageError, nearest
from ffcv_imnet.core.names import quoted
from ffcv_imnet.core.paths import HERE, expanded, is_address

MOST_INTEGER = 2**63 - 1
LONGEST_TEXT = 4096  # characters: no path is longer
MOST_EPOCHS = 100_000  # the plan has a row for each


NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})?(\.[0-9]{0,99})?([eE][-+]?[0-9]{1,3})?", re.ASCII)


class RowError(ValueError):
    """What is wrong with a value, in words for the user, where its domain does not say it all."""


def argument(name: str, value: object, checker: Checker) -> Any:
    """The argument or setting `name`, as `checker` takes it. Raises UsageError.

    A number of numpy's counts as Python's.
    """
    plain = value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value
    try:
        return checker.check(plain)
    except RowError as error:
        raise UsageError(f"{name}, {error}") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UsageError(f"{name} must be {checker.help()}, not {quoted(plain)}") from None


def _parts(value: object) -> list[Any]:
    """`[a, b]` of YAML, `a,b` of the command line, or one number. Raises ValueError."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]()").split(",")]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, int | float):
        return [value]
    raise ValueError


class Number(Checker):
    """An int or a float within bounds."""

    def __init__(self, kind: type[int] | type[float], low: float, high: float) -> None:
        self.kind, self.low, self.high = kind, low, high

    def check(self, value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        # float() would take 1_000, 010 and more.
        if isinstance(value, str) and not NUMBER.fullmatch(value):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):  # JSON has no infinity, and int() of it is another error
            raise ValueError
        if self.kind is int:
            plain = isinstance(value, int) or re.fullmatch(r"-?\d+", str(value))
            # A 63-bit seed does not fit a float.
            exact = int(value) if plain else int(number)
            if abs(exact) > MOST_INTEGER or (not plain and exact != number):
                raise ValueError
            number = exact
        if not self.low <= number <= self.high:
            raise ValueError
        return number

    def help(self) -> str:
        noun = "an integer" if self.kind is int else "a number"
        low, high = (
            str(bound) if isinstance(bound, int) else f"{bound:g}"
            for bound in (self.low, self.high)
        )
        if math.isinf(self.high):
            return noun if math.isinf(self.low) else f"{noun} of at least {low}"
        return f"{noun} from {low} to {high}"


class OneOf(Checker):
    """One of two integers."""

    def __init__(self, first: int, second: int) -> None:
        self.numbers = first, second

    def check(self, value: object) -> int:
        number = Number(int, *self.numbers).check(value)
        if number not in self.numbers:
            raise ValueError
        return int(number)

    def help(self) -> str:
        return "{} or {}".format(*self.numbers)


class Switch(Checker):
    """true or false, in YAML's words or as 1 and 0."""

    def check(self, value: object) -> bool:
        word = str(value).lower()
        if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            raise ValueError
        return word in ("true", "yes", "on", "1")

    def help(self) -> str:
        return "true or false"


class Choice(Checker):
    """One of a few words; `once` maps what earlier recipes say to what it is called now."""

    def __init__(self, words: Sequence[str], once: dict[str, str] | None = None) -> None:
        self.words, self.once = words, once or {}

    def check(self, value: object) -> str:
        word = str(value).lower()
        word = self.once.get(word, word)
        if word not in self.words:
            raise ValueError
        return word

    def help(self) -> str:
        return "one of " + ", ".join(self.words)


class Channels(Checker):
    """A number for each of red, green and blue, or one for all, in units of pixels from 0 to 255."""

    def __init__(self, low: float) -> None:
        self.number = Number(float, low, 1e4)

    def check(self, value: object) -> tuple[float, float, float]:
        numbers = [self.number.check(part) for part in _parts(value)]
        if len(numbers) not in (1, 3):
            raise ValueError
        if 0 < max(numbers) <= 1:
            raise RowError(
                f"{quoted(value)} must be of pixels from 0 to 255 (torchvision's 0.229 is 58.395)"
            )
        red, green, blue = numbers * (3 // len(numbers))
        return float(red), float(green), float(blue)

    def help(self) -> str:
        return f"one or three numbers from {self.number.low:g}, of pixels from 0 to 255"


class Freeze(Checker):
    """What of a network is not trained."""

    def check(self, value: object) -> str:
        word = str(value).lower()
        if word in ("none", "body"):
            return word
        return str(Number(int, 1, 1000).check(value))

    def help(self) -> str:
        return "none, body, or a number of stages"


class Words(Checker):
    """Some of a few words, or none: `[a, b]` in YAML, `a,b` on the command line."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def check(self, value: object) -> tuple[str, ...]:
        chosen = {str(part).lower() for part in _parts(value)}
        if chosen - {"", *self.words}:
            raise ValueError
        return tuple(word for word in self.words if word in chosen)

    def help(self) -> str:
        return "any of " + ", ".join(self.words)


class Text(Checker):
    """Any text that is not empty."""

    def check(self, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        if len(value) > LONGEST_TEXT or re.search("[\0\ud800-\udfff]", value):
            raise RowError(
                f"{quoted(value)} cannot be stored: it is longer than {LONGEST_TEXT} characters or not UTF-8"
            )
        return value

    def help(self) -> str:
        return "a text"


class PathText(Text):
    """A file or folder, or where `remote` an address; see `core.paths`."""

    def __init__(self, remote: bool = False) -> None:
        self.remote = remote

    def check(self, value: object) -> str:
        text = super().check(value)
        if is_address(text) and not self.remote:
            raise RowError(f"{quoted(text)} is an address: {HERE}")
        return expanded(text)

    def help(self) -> str:
        return "a path"


class Range(Checker):
    """Two numbers, the smaller first: `[0.35, 1]` in YAML, `0.35,1` on the command line."""

    def __init__(self, low: float, high: float) -> None:
        self.number = Number(float, low, high)

    def check(self, value: object) -> tuple[float, float]:
        first, second = (self.number.check(part) for part in _parts(value))  # else ValueError
        if first > second:
            raise ValueError
        return first, second

    def help(self) -> str:
        return f"two numbers from {self.number.low:g} to {self.number.high:g}, the smaller first"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of `plan.stages`. What it leaves out is taken from the settings of that name."""

    epochs: int
    resolution: int  # side of the training crops, px
    crop_scale: tuple[float, float] | None = None
    batch_size: int | None = None  # global
    label_smoothing: float | None = None


class Stages(Checker):
    """A list of `Stage`s: in YAML as it is, on the command line as YAML text. `check` raises RowError."""

    columns: ClassVar[dict[str, Checker]] = {
        "epochs": Number(int, 1, MOST_EPOCHS),
        "resolution": Number(int, 8, 4096),
        "crop_scale": Range(0.001, 1.0),
        "batch_size": Number(int, 1, math.inf),
        "label_smoothing": Number(float, 0.0, 0.9999),
    }

    def check(self, value: object) -> tuple[Stage, ...]:
        try:
            rows = load_yaml(value) if isinstance(value, str) else value
        except StrictError as error:
            raise RowError(str(error)) from None
        if not isinstance(rows, list | tuple):
            raise ValueError
        return tuple(
            row if isinstance(row, Stage) else self._stage(row, f"row {number}")
            for number, row in enumerate(rows, 1)
        )

    def _stage(self, row: object, where: str) -> Stage:
        if not isinstance(row, dict):
            raise RowError(
                f"{where} must be settings such as {{epochs: 3, resolution: 128}}, not {quoted(row)}"
            )
        values = {}
        for key, value in row.items():
            if key not in self.columns:
                raise RowError(
                    f"{where}: unknown {quoted(key)}{nearest(str(key), list(self.columns))}; known are "
                    f"{', '.join(self.columns)}"
                )
            try:
                values[key] = self.columns[key].check(value)
            except (ValueError, TypeError, OverflowError):
                domain = self.columns[key].help()
                raise RowError(f"{where}: {key} must be {domain}, not {quoted(value)}") from None
        for key in ("epochs", "resolution"):
            if key not in values:
                raise RowError(f"{where} has no {key}")
        return Stage(**values)

    def help(self) -> str:
        optional = [name for name in self.columns if name not in ("epochs", "resolution")]
        return (
            "a list of rows such as {epochs: 3, resolution: 128}, each with optional "
            + ", ".join(optional)
        )

"""The manifest beside a .beton, OUT_DIR/SPLIT.json: its fields, and the one place that checks them."""

import dataclasses
import datetime
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffcv_imnet.core.atomic import atomic_write
from ffcv_imnet.core.bounded import no_number
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.names import fault_of, fault_of_all, quoted
from ffcv_imnet.core.paths import open_regular

MANIFEST_FORMAT = 1
# Bytes. ImageNet's has 0.1 MB, and 100 more for every unreadable image that was left out; JSON takes
# up to twenty times its size in memory.
LARGEST = 32 << 20


@dataclass(frozen=True)
class Manifest:
    """What a .beton holds. Sizes in bytes."""

    format: int
    split: str
    samples: int
    classes: tuple[str, ...]  # names in index order
    class_counts: tuple[int, ...]
    bytes: int
    content_checksum: str  # labels and stored bytes in index order, whatever the page layout
    tables_checksum: str  # header, field descriptors, metadata, allocation table
    settings: dict[str, Any]  # how the images were chosen and stored
    source: dict[str, Any]  # kind, fingerprint, images, ignored files
    skipped: tuple[dict[str, str], ...]  # path and reason of every unreadable image left out
    versions: dict[str, str]
    created: str  # UTC, ISO 8601

    def save(self, path: Path) -> None:
        """Write as JSON. Raises NotWritten."""
        with atomic_write(path, "w") as file:
            json.dump(dataclasses.asdict(self), file, indent=1, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read `path` and check every field of it.

        Raises:
            UsageError: there is no such file.
            RunError: it is not a manifest of this format; the message names the field.
        """
        fields = _parse(path)
        # JSON's true equals 1.
        if (
            not isinstance(fields, dict)
            or fields.get("format") != MANIFEST_FORMAT
            or fields["format"] is True
        ):
            raise RunError(f"{path} is not a manifest of format {MANIFEST_FORMAT}: {again(path)}")
        if wrong := {field.name for field in dataclasses.fields(cls)} ^ set(fields):
            name = quoted(min(wrong))
            raise RunError(f"the manifest {path} lacks or misnames {name}: {again(path)}")
        for name, check in _SCHEMA.items():
            if fault := check(fields[name]):
                raise RunError(f"the manifest {path}: {name!r} {fault}: {again(path)}")
        if fault := _fault_of_counts(fields):
            raise RunError(f"the manifest {path}: {fault}: {again(path)}")
        for name in ("classes", "class_counts", "skipped"):
            fields[name] = tuple(fields[name])
        return cls(**fields)

    def divided_otherwise(self, other: "Manifest") -> bool:
        """Whether both were written with --holdout, and not as the two sides of one division."""

        def division(said: Manifest) -> list[Any]:
            settings = [said.settings.get(name) for name in ("holdout", "seed", "subset")]
            return [*settings, said.source.get("fingerprint")]

        both = None not in (self.settings.get("holdout"), other.settings.get("holdout"))
        return both and division(self) != division(other)


def manifest_path(beton: Path) -> Path:
    """The manifest's place: the same name, ending in .json."""
    return beton.with_suffix(".json")


def command(path: Path) -> str:
    """What to do where a .beton or its manifest is missing."""
    return f"write it with `{_write(path)}`"


def again(path: Path) -> str:
    """What to do where a .beton or its manifest is damaged."""
    return f"write it again with `{_write(path)} --force`"


def _write(path: Path) -> str:
    split = path.stem if path.stem in ("train", "val") else "SPLIT"
    return f"python write_ffcv.py --split {split} --data_dir IMAGES --out_dir {path.parent}"


# ------------------------------------------------------------------------------------ the text


def _parse(path: Path) -> Any:
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise RunError(
                f"the manifest {path} is larger than {LARGEST >> 20} MB, and those of millions of"
                f" images are not: {again(path)}"
            )
        return json.loads(
            text.decode("utf-8", errors="surrogateescape"),
            object_pairs_hook=_no_key_twice,
            parse_constant=no_number,
        )
    except FileNotFoundError:
        raise UsageError(f"the manifest {path} does not exist: {command(path)}") from None
    except RecursionError:
        raise RunError(f"the manifest {path} is nested too deeply: {again(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"the manifest {path} cannot be read ({reason}): {again(path)}") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has {quoted(twice)} twice")
    return found


# ---------------------------------------------------------------------------------- the schema

# What is wrong with a value, to follow its key; None if nothing.
_Check = Callable[[Any], str | None]


def _fault_of_count(value: Any) -> str | None:
    if type(value) is not int or not 0 <= value < 1 << 63:
        return f"is {quoted(value)}, not a count"
    return None


def _fault_of_positive(value: Any) -> str | None:
    return "is 0" if value == 0 and type(value) is int else _fault_of_count(value)


def _fault_of_line(value: Any) -> str | None:
    fault = fault_of(value)
    return f"is {quoted(value)}, which {fault}" if fault else None


def _fault_of_checksum(value: Any) -> str | None:
    if not isinstance(value, str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", value):
        return f"is {quoted(value)}, not sha256: and 64 hexadecimal digits"
    return None


def _fault_of_time(value: Any) -> str | None:
    try:
        datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return f"is {quoted(value)}, not a time of ISO 8601"
    return None


def _fault_of_list(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"is {quoted(value)}, not a list of counts"
    return next((fault for count in value if (fault := _fault_of_count(count))), None)


def _fault_of_plain(value: Any) -> str | None:
    """A mapping of names to plain values, as the settings and the source are."""
    if not isinstance(value, dict):
        return f"is {quoted(value)}, not a mapping"
    for key, held in value.items():
        if fault_of(key):
            return f"has the key {quoted(key)}, which {fault_of(key)}"
        if isinstance(held, (int, float)) and not abs(held) < 1 << 63:  # 1e999 is infinite
            return f"has {quoted(key)} beyond 64 bits"
        if held is not None and not isinstance(held, (bool, int, float, str)):
            return f"has {quoted(key)}, which is neither a number nor text"
        if isinstance(held, str) and held and fault_of(held):
            return f"has {quoted(key)}, which {fault_of(held)}"
    return None


def _fault_of_versions(value: Any) -> str | None:
    if isinstance(value, dict) and not all(isinstance(held, str) for held in value.values()):
        return "has a version that is not text"
    return _fault_of_plain(value)


def _fault_of_skipped(value: Any) -> str | None:
    if not isinstance(value, list):
        return f"is {quoted(value)}, not a list"
    for entry in value:
        # The paths of images, unlike names of classes, may be bytes of any kind.
        if not isinstance(entry, dict) or set(entry) != {"path", "reason"}:
            return "has an entry that is not a path and a reason"
        if not all(isinstance(text, str) for text in entry.values()):
            return "has an entry that is not text"
    return None


_SCHEMA: dict[str, _Check] = {
    "split": _fault_of_line,
    "samples": _fault_of_positive,
    "classes": fault_of_all,
    "class_counts": _fault_of_list,
    "bytes": _fault_of_positive,
    "content_checksum": _fault_of_checksum,
    "tables_checksum": _fault_of_checksum,
    "settings": _fault_of_plain,
    "source": _fault_of_plain,
    "skipped": _fault_of_skipped,
    "versions": _fault_of_versions,
    "created": _fault_of_time,
}


def _fault_of_counts(fields: dict[str, Any]) -> str | None:
    classes, counts = len(fields["classes"]), fields["class_counts"]
    if len(counts) != classes:
        return f"'class_counts' has {len(counts):,} counts of {classes:,} 'classes'"
    if (total := sum(counts)) != fields["samples"]:
        return f"'class_counts' add up to {total:,} and 'samples' is {fields['samples']:,}"
    return None

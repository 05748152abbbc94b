"""What `export` wrote beside the numbers of a network, as texts of an ONNX or .safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ffcv_imnet.core.names import fault_of_all, quoted
from ffcv_imnet.core.typed import fault_of_fields
from ffcv_imnet.images.preprocess import INTERPOLATIONS

PREFIX = "ffcv_imnet."
LARGEST = 16 << 20  # characters of one: a hundred thousand names of classes have a fifth


@dataclass(frozen=True)
class _Notes:
    classes: list[str] | None = None
    arch: str | None = None
    blurpool: bool | None = None
    resolution: int | None = None
    crop_ratio: float | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


def read_notes(found: Mapping[str, str]) -> dict[str, Any]:
    """The values by their names without the prefix; others are not read, nulls left out.

    Raises:
        ValueError: one of them cannot be, in words.
    """
    notes: dict[str, Any] = {}
    for key in (PREFIX + field.name for field in fields(_Notes)):
        if key not in found:
            continue
        if len(found[key]) > LARGEST:
            raise ValueError(f"its {key} has more than {LARGEST:,} characters")
        try:
            notes[key.removeprefix(PREFIX)] = json.loads(found[key])
        except (ValueError, RecursionError):
            raise ValueError(f"its {key} is not JSON") from None
    notes = {key: value for key, value in notes.items() if value is not None}
    if fault := fault_of_fields(_Notes, notes):
        raise ValueError(f"what export noted in it {fault}")
    if "classes" in notes and (fault := fault_of_all(notes["classes"])):
        raise ValueError(f"its list of classes {fault}")
    possible = {
        "resolution": lambda side: 1 <= side <= 65535,
        "crop_ratio": lambda ratio: 0.01 <= ratio <= 1,
        "interpolation": lambda name: name in INTERPOLATIONS,
        "mean": lambda values: len(values) == 3,
        "std": lambda values: len(values) == 3 and min(values) > 0,
    }
    for key, can_be in possible.items():
        if key in notes and not can_be(notes[key]):
            raise ValueError(f"what export noted in it has {quoted(notes[key])} as its {key}")
    return notes

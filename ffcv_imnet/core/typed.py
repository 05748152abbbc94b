"""Whether values that were read from a file are the fields of a dataclass: the one check of logs and
checkpoints, whose types are believed everywhere after it."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from ffcv_imnet.core.names import quoted

LARGEST = 2**63 - 1  # of an integer; none is negative


def fault_of_fields(kind: type, values: Mapping[str, Any]) -> str | None:
    """What keeps `values` from being the fields of `kind`, to follow "it"; None if nothing does.

    A field with a default may be missing. Fields named top_1 or top_5 are fractions of one.
    """
    hints = _hints(kind)
    for item in fields(kind):
        if item.name not in values:
            if item.default is MISSING and item.default_factory is MISSING:
                return f"has no {item.name}"
            continue
        value = values[item.name]
        if not is_value(value, hints[item.name]):
            return f"has {quoted(value)} as its {item.name}"
        if item.name.endswith(("top_1", "top_5")) and value is not None and not 0 <= value <= 1:
            return f"has {quoted(value)} as its {item.name}, which is a fraction of one"
    known = {item.name for item in fields(kind)}
    unknown = [name for name in values if name not in known]
    return f"has the unknown field {quoted(unknown[0])}" if unknown else None


def is_value(value: object, hint: Any) -> bool:
    """Whether a value of JSON or a checkpoint is of an annotated type; numbers must be finite."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(is_value(value, one) for one in inner)
    if hint is type(None):
        return value is None
    if origin is dict:
        return isinstance(value, dict) and all(
            is_value(key, inner[0]) and is_value(held, inner[1]) for key, held in value.items()
        )
    if origin is list:
        return isinstance(value, list) and all(is_value(held, inner[0]) for held in value)
    if is_dataclass(hint):
        return isinstance(value, dict) and fault_of_fields(hint, value) is None  # type: ignore[arg-type]
    if hint is int:
        return type(value) is int and 0 <= value <= LARGEST
    if hint is float:
        return (type(value) is float and math.isfinite(value)) or is_value(value, int)
    return type(value) is hint


_hints = cache(get_type_hints)

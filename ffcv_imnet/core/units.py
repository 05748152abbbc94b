"""Bytes and seconds as a person says them."""

import math


def of_disk(count: float) -> str:
    """Bytes as disks are sold: 330 MB, 150.4 GB."""
    return _in_units(count, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def of_memory(count: float) -> str:
    """Bytes as memory is sold: 64 MiB, 15.6 GiB."""
    return _in_units(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _in_units(count: float, base: int, units: tuple[str, ...]) -> str:
    power = min(len(units) - 1, int(math.log(max(count, 1), base)))
    value = count / base**power
    return f"{round(value, 1):,g} {units[power]}"


def duration(seconds: float) -> str:
    """48 s, 13.5 min, 2.1 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

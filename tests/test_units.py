import pytest

from ffcv_imnet.core.units import duration, of_disk, of_memory


@pytest.mark.parametrize(
    ("count", "disk", "memory"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1_500, "1.5 kB", "1.5 KiB"),
        (64 << 20, "67.1 MB", "64 MiB"),
        (1.5e9, "1.5 GB", "1.4 GiB"),
        (150.4e9, "150.4 GB", "140.1 GiB"),
        (5e18, "5,000 PB", "4,440.9 PiB"),
    ],
)
def test_bytes(count: float, disk: str, memory: str) -> None:
    assert (of_disk(count), of_memory(count)) == (disk, memory)


def test_seconds() -> None:
    assert [duration(s) for s in (48, 810, 7600)] == ["48 s", "13.5 min", "2.1 h"]

"""Reading ahead: the same batches, what is asked for and nothing else, and nothing left behind."""

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.data import loader as data
from ffcv_imnet.data import read_ahead
from ffcv_imnet.data.beton import read_tables
from tests.conftest import SmallData
from tests.test_data import ALONE, train_batches, world


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every stretch that the disk was asked for, as start and end, instead of asking."""
    seen: list[tuple[int, int]] = []

    def note(file_at: int, starts: np.ndarray, ends: np.ndarray) -> None:
        seen.extend(zip(starts.tolist(), ends.tolist(), strict=True))

    monkeypatch.setattr(read_ahead, "_ask", note)
    return seen


def test_reading_ahead_changes_no_batch(small: SmallData, tmp_path: Path) -> None:
    without = train_batches(small.settings(tmp_path, data__read_ahead=0), small)
    ours = train_batches(small.settings(tmp_path, data__read_ahead=2), small)
    for (images, labels), (again, labels_again) in zip(without, ours, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, labels_again)


def test_a_process_asks_for_its_own_images_once_in_order(
    small: SmallData, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    batches = train_batches(small.settings(tmp_path), small, world(1, 2))
    tables = read_tables(small.train)
    order = data.share_of_order(data.epoch_order(100, 0, 1), 8, 1, 2)
    assert len(order) == 48 and len(batches) == 6
    pictures = [(int(tables.pointers[i]), int(tables.pointers[i] + tables.sizes[i])) for i in order]
    covered = [p for p in pictures if any(a <= p[0] and p[1] <= b for a, b in asked)]
    assert covered == pictures
    assert sum(b - a for a, b in asked) == sum(b - a for a, b in pictures)
    firsts = [next(n for n, (a, b) in enumerate(asked) if a <= p[0] < b) for p in pictures]
    assert firsts == sorted(firsts)


def test_neighbours_are_asked_for_together(
    small: SmallData, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    loader = data.ValLoader(str(small.val), 33, small.settings(tmp_path), ALONE)
    assert len(list(loader.batches())) == len(asked) == 3


def test_no_more_batches_are_asked_for_than_said(
    small: SmallData, tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    settings = small.settings(tmp_path, data__read_ahead=1, data__batches_ahead=1)
    loader = data.TrainLoader(str(small.train), 100, settings, ALONE)
    many = np.resize(np.arange(0, 96, 2), 16 * 20)
    batches = loader.loader.batches(many, torch.device("cpu"))
    next(batches)
    time.sleep(0.5)
    # One in use, one decoded, one that waits for room, and one ahead of it.
    assert 16 <= len(asked) <= 16 * 4
    batches.close()


def test_nothing_is_left_behind(small: SmallData, tmp_path: Path) -> None:
    loader = data.TrainLoader(str(small.train), 100, small.settings(tmp_path), ALONE)
    plan = plan_run(small.settings(tmp_path), 100)[0]
    assert loader.loader.read_ahead > 0
    next(batches := loader.epoch(plan))
    batches.close()
    files, threads = sorted(Path("/proc/self/fd").iterdir()), threading.active_count()
    for left_early in (True, False, True):
        batches = loader.epoch(plan)
        next(batches)
        if not left_early:
            assert len(list(batches)) == 5
        batches.close()
    assert sorted(Path("/proc/self/fd").iterdir()) == files and threading.active_count() == threads


def resident(mapped: np.ndarray) -> np.ndarray:
    """Which pages of a mapped file are in memory: mincore(2)."""
    pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    address, length = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)) == 0
    return (pages & 1).astype(bool)


def test_what_is_asked_for_is_read_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1024 * mmap.PAGESIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = np.memmap(path, np.uint8, "r")
    if resident(mapped).any():
        pytest.skip("this file system keeps its files in memory")
    page = mmap.PAGESIZE
    # Two neighbours, a long one, a short one within a page, the file's end.
    starts = np.array([page, 3 * page + 7, 100 * page, 500 * page + 5, 1023 * page + 100])
    ends = np.array([3 * page + 7, 4 * page, 200 * page - 1, 500 * page + 9, 1024 * page])
    expected = np.zeros(1024, bool)
    for first, last in ((1, 4), (100, 200), (500, 501), (1023, 1024)):
        expected[first:last] = True
    thread = read_ahead.ReadAhead(mapped, starts, ends, [np.arange(5)], 1)
    until = time.perf_counter() + 20
    while not resident(mapped)[expected].all() and time.perf_counter() < until:
        time.sleep(0.01)
    thread.stop()
    assert np.array_equal(resident(mapped), expected)

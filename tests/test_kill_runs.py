"""A killed run, repeated, ends as an undisturbed one. `tests/kill_runs.py` does it on real data."""

from pathlib import Path

import pytest

from tests.archives import member, pack_train, tar_of
from tests.kill_runs import Way, beton_way, kill_runs, prepare_way
from tests.pictures import make_slow_tree


def tar_way(folder: Path) -> Way:
    tar = pack_train(make_slow_tree(folder / "tree", 60), folder / "train.tar")
    return beton_way("tar", "train", "--tar", tar, "--compress_probability", "0")


def unpacking(folder: Path) -> Way:
    inner = [tar_of(*(member(f"{i:04}.jpg", bytes(9000)) for i in range(1500))) for _ in range(3)]
    (folder / "train.tar").write_bytes(
        tar_of(*(member(f"n{i}.tar", data) for i, data in enumerate(inner)))
    )
    return prepare_way("--train_tar", folder / "train.tar")


@pytest.mark.parametrize("make", [tar_way, unpacking])
def test_killed_and_run_again(make: object, tmp_path: Path) -> None:
    assert callable(make)
    (killed,) = kill_runs(make(tmp_path), tmp_path / "runs", moments=(0.5,))
    assert killed.same and not killed.half and 0.4 < killed.reached < 1

"""Several gloo processes: the same counts and gradients as one; a lost one comes back by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train.run_dir import RunFolder
from tests.conftest import SmallData
from tests.test_training import run


@pytest.fixture(scope="module")
def found(small: SmallData, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What 1, 2, 3 and 4 processes find of one checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = small.settings(folder / "run", training__epochs=1, training__batch_size=48)
    assert run(settings) == 0
    (folder / "config.yaml").write_text(to_yaml(settings))
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {size: torch.load(folder / f"{size}.pt", weights_only=True) for size in (1, 2, 3, 4)}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_validation_counts_are_those_of_one_process(
    size: int, found: dict[int, dict[str, Any]]
) -> None:
    one, several = found[1]["metrics"], found[size]["metrics"]
    assert several["images"] == 33
    assert (several["top_1"], several["top_5"]) == (one["top_1"], one["top_5"])
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gradients_are_those_of_one_process(size: int, found: dict[int, dict[str, Any]]) -> None:
    """To fp32's rounding, with BatchNorm frozen; each process had its share of the same batch."""
    assert found[size]["batch"] * size == found[1]["batch"] == 48
    assert len(found[1]["gradients"]) == len(found[size]["gradients"]) > 0
    for ours, wanted in zip(found[size]["gradients"], found[1]["gradients"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_processes_that_disagree_do_not_start(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each machine has a folder of its own, and only one of them holds the run."""
    world = World(1, 2, 1, 2, torch.device("cpu"))
    folder = RunFolder(tmp_path, small.settings(tmp_path), ("a",), {"train": "x", "val": "y"})
    said: list[str] = []

    def agree(_: World, what: str) -> bool:
        said.append(what)
        return len(set(said)) == 1

    monkeypatch.setattr(World, "agree", agree)
    folder.check_agreement(world)
    folder.settings = small.settings(tmp_path / "elsewhere", data__num_workers=1)
    folder.check_agreement(world)  # none of the result
    folder.settings = small.settings(tmp_path, lr__lr=0.7)
    with pytest.raises(UsageError, match="a folder that all share"):
        folder.check_agreement(world)


def test_a_killed_process_comes_back_by_itself(small: SmallData, tmp_path: Path) -> None:
    """torchrun --max_restarts: kill -9 of the first process; the run ends without a hand."""
    settings = small.settings(
        tmp_path / "run", training__epochs=4, training__checkpoint_minutes=1e-9
    )
    (tmp_path / "c.yaml").write_text(to_yaml(settings))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ["--max_restarts=2", "-m", "tests.networks", "--resume", "auto"]
    words = [sys.executable, *torchrun, *script, "--config", str(tmp_path / "c.yaml")]
    heartbeat = tmp_path / "run/heartbeat.json"
    # Else the processes of the second start may read the addresses of the first (docs/SCALING.md).
    alone = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=alone
    ) as process:
        while process.poll() is None and not heartbeat.exists():
            time.sleep(0.01)
        os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGKILL)
        said = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, said
    log = read_log(tmp_path / "run")
    assert [epoch.epoch for epoch in log.epochs] == [0, 1, 2, 3] and log.summary is not None
    assert [header.world_size for header in log.headers][-1] == 2
    assert json.loads(heartbeat.read_text())["doing"] == "finished"

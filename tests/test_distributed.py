"""Several gloo processes: the same counts and gradients as one; a lost one comes back by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core.errors import RunError, UsageError
from ffcv_imnet.core.log import read_log
from ffcv_imnet.data import loader as data
from ffcv_imnet.machine.distributed import Ranks, World, read_ranks, together
from ffcv_imnet.models import build_model
from ffcv_imnet.tools import evaluate
from ffcv_imnet.train.epoch import build_learner
from ffcv_imnet.train.failures import explained
from ffcv_imnet.train.run_dir import RunFolder
from ffcv_imnet.train.validate import Metrics
from tests import ranks
from tests.conftest import SmallData
from tests.test_data import ALONE
from tests.test_evaluation import assert_equal, plain_loop
from tests.test_training import run


def words_of(small: SmallData, folder: Path) -> list[list[str]]:
    """Of `evaluate`: a .beton, and a folder of images."""
    plain = ["--weights", str(folder / "run/best.pt"), "--num_workers", "1", "--batch_size", "16"]
    places = small.val, small.val.parent / "images" / "val"
    return [[*plain, "--data", str(place)] for place in places]


@pytest.fixture(scope="module")
def found(small: SmallData, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What 1, 2, 3 and 4 processes find of one checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = small.settings(folder / "run", training__epochs=1, training__batch_size=48)
    assert run(settings) == 0
    (folder / "config.yaml").write_text(to_yaml(settings))
    (folder / "words.json").write_text(json.dumps(words_of(small, folder)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks", str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    by_size = {size: torch.load(folder / f"{size}.pt", weights_only=True) for size in (1, 2, 3, 4)}
    return by_size | {0: {"folder": folder}}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_validation_counts_are_those_of_one_process(
    size: int, found: dict[int, dict[str, Any]]
) -> None:
    one, several = found[1]["metrics"], found[size]["metrics"]
    assert several["images"] == 33
    assert (several["top_1"], several["top_5"]) == (one["top_1"], one["top_5"])
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-6)
    counts = [found[processes]["label_counts"].tolist() for processes in (1, size)]  # ImageLoader's
    assert sum(counts[0]) == 33 and counts[0] == counts[1]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gradients_are_those_of_one_process(size: int, found: dict[int, dict[str, Any]]) -> None:
    """To fp32's rounding, with BatchNorm frozen; each process had its share of the same batch."""
    assert found[size]["batch"] * size == found[1]["batch"] == 48
    assert len(found[1]["gradients"]) == len(found[size]["gradients"]) > 0
    for ours, wanted in zip(found[size]["gradients"], found[1]["gradients"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_two_processes_measure_and_the_first_tells(found: dict[int, dict[str, Any]]) -> None:
    """And alone writes a checkpoint, as in training; nothing is left behind."""
    folder = found[0]["folder"]
    said = [json.loads((folder / f"measured_{number}.json").read_text()) for number in (0, 1)]
    assert said == [{"measured": True, "saved": 1}, {"measured": False, "saved": 0}]
    assert not list(folder.rglob(".measure_*"))


def test_two_compiled_processes_make_the_steps_of_one(found: dict[int, dict[str, Any]]) -> None:
    """The network compiled within DistributedDataParallel, with Muon: a whole graph for each of two resolutions and
    one for validation, none on returning."""
    for size in (1, 2):
        assert found[size]["graphs"] == [3, 3] and found[size]["breaks"] == []
    for ours, wanted in zip(found[2]["weights"], found[1]["weights"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5)


def test_two_processes_are_the_plain_loop(
    found: dict[int, dict[str, Any]], small: SmallData, tmp_path: Path
) -> None:
    settings = small.settings(tmp_path)
    model = build_model(settings, 10)
    for buffer in model.buffers():
        if buffer.shape == (16,) and not buffer.any():
            buffer += 1.0  # the mean over both
    reference = plain_loop(model, data.ValLoader(str(small.val), 33, settings, ALONE))
    metrics, mean, votes = found[2]["agreed"]
    assert_equal(Metrics(**metrics), reference)
    assert mean == 1.0 and votes == [True, False]


@pytest.mark.parametrize("place", [0, 1])
def test_the_evaluate_command_gives_the_same_rows(
    place: int, found: dict[int, dict[str, Any]], small: SmallData
) -> None:
    folder = found[0]["folder"]
    one = folder / f"one_{place}.json"
    assert evaluate.main([*words_of(small, folder)[place], "--out", str(one)]) == 0
    both = json.loads((folder / f"two_{place}.json").read_text())
    (alone,), (together,) = json.loads(one.read_text())["views"], both["views"]
    assert both["world_size"] == 2 and together["images"] == alone["images"]
    assert together["per_class"] == alone["per_class"] and together["confused"] == alone["confused"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert together["ece"] == pytest.approx(alone["ece"], abs=1e-6)


def test_the_others_do_not_wait_for_one_that_failed(capfd: pytest.CaptureFixture[str]) -> None:
    children = {}
    for number, words in ((0, ["sleep", "600"]), (1, ["sh", "-c", "echo why >&2; exit 3"])):
        children[os.posix_spawnp(words[0], words, os.environ)] = number
    assert ranks.wait_for_all(children) == 1
    assert capfd.readouterr().err == "why\nprocess 1 ended with 3\n"


GIVEN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def test_the_world_of_the_environment() -> None:
    assert read_ranks({"HOME": "/root"}) == Ranks(0, 1, 0, 1)
    assert read_ranks(GIVEN) == Ranks(3, 8, 1, 2)
    # A cluster's single job.
    assert read_ranks({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"WORLD_SIZE": None}, "RANK but no WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE but no RANK"),
        ({"LOCAL_RANK": None}, "RANK but no LOCAL_RANK"),
        ({"MASTER_PORT": None}, "RANK but no MASTER_PORT"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http', which is no port"),
        ({"MASTER_PORT": "65536"}, "which is no port"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='', which is no number"),
        ({"RANK": "-1"}, "RANK='-1', which is no number"),
        ({"RANK": "one"}, "RANK='one', which is no number"),
        ({"RANK": "\u0663"}, "which is no number"),  # an Arabic digit, which int() takes
        ({"WORLD_SIZE": "0"}, "a world of 0 processes"),
        ({"LOCAL_WORLD_SIZE": "0"}, "a world of 0 processes"),
        ({"RANK": "8"}, "RANK=8 in a world of 8"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 of 2 on this machine"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 in a world of 8"),
    ],
)
def test_a_world_by_halves_is_refused(change: dict[str, str | None], said: str) -> None:
    given = {name: value for name, value in (GIVEN | change).items() if value is not None}
    with pytest.raises(UsageError, match=said) as refused:
        read_ranks(given)
    assert "torchrun" in str(refused.value) and "\n" not in str(refused.value)


def test_who_disagrees_still_votes_as_often_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others wait for a vote that never comes."""
    world, asked = World(1, 2, 1, 2, torch.device("cpu")), []

    def least(_: World, value: int) -> int:
        asked.append(value)
        return value - 1  # of another process

    monkeypatch.setattr(World, "least", least)
    assert not world.agree("something else") and len(asked) == 2


def test_processes_that_disagree_do_not_start(
    small: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each machine has a folder of its own, and only one of them holds the run."""
    world = World(1, 2, 1, 2, torch.device("cpu"))
    folder = RunFolder(
        tmp_path, small.settings(tmp_path), ("a",), {"train": "x", "val": "y"}, world, 0
    )
    said: list[str] = []

    def agree(_: World, what: str) -> bool:
        said.append(what)
        return len(set(said)) == 1

    monkeypatch.setattr(World, "agree", agree)
    folder.check_agreement()
    folder.settings = small.settings(tmp_path / "elsewhere", data__num_workers=1)
    folder.check_agreement()  # none of the result
    for odd in ({"lr__lr": 0.7}, {"validation__batch_size": 8}):  # each batch is a vote
        folder.settings = small.settings(tmp_path, **odd)
        with pytest.raises(UsageError, match="a folder that all share"):
            folder.check_agreement()


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and theirs."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid for child in found for pid in (int(child), *descendants(int(child)))]


def test_a_job_that_is_killed_and_then_asked_to_end(small: SmallData, tmp_path: Path) -> None:
    """kill -9 of the first process: torchrun --max_restarts starts both again, without a hand. Then SIGTERM to all,
    as `scancel` sends it: the workers are asked, and once more by torchrun. The run goes on from there."""
    settings = small.settings(
        tmp_path / "run", training__epochs=4, training__checkpoint_minutes=1e-9
    )
    (tmp_path / "c.yaml").write_text(to_yaml(settings))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ["--max_restarts=2", "-m", "tests.networks", "--resume", "auto"]
    words = [sys.executable, *torchrun, *script, "--config", str(tmp_path / "c.yaml")]
    # Else the processes of the second start may read the addresses of the first (docs/SCALING.md).
    alone = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=alone
    ) as process:
        first = beating(process, tmp_path / "run", 0)
        os.kill(first, signal.SIGKILL)
        beating(process, tmp_path / "run", first)
        workers = descendants(process.pid)
        for pid in [*workers, process.pid]:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)  # two at once may be one for a process that has no time to look
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[0].decode()
    assert "stopped by SIGTERM in epoch " in said, said
    assert json.loads((tmp_path / "run/heartbeat.json").read_text())["doing"] == "stopped"
    before = len(read_log(tmp_path / "run").epochs)
    assert run(settings, "auto") == 0
    log = read_log(tmp_path / "run")
    sizes = [header.world_size for header in log.headers]
    assert sizes[-2:] == [2, 1] and log.summary is not None
    assert log.headers[-1].first_epoch == before
    assert [epoch.epoch for epoch in log.epochs] == [0, 1, 2, 3]


def beating(process: "subprocess.Popen[bytes]", folder: Path, other_than: int) -> int:
    """The process that writes the heartbeat, once it is another one than that."""
    heartbeat = folder / "heartbeat.json"
    while process.poll() is None:
        time.sleep(0.01)
        with suppress(FileNotFoundError):
            if (pid := int(json.loads(heartbeat.read_text())["pid"])) != other_than:
                return pid
    assert process.stdout is not None
    raise AssertionError(process.stdout.read().decode())


def test_what_the_others_left_behind_is_one_sentence() -> None:
    """Of a process that died while they set up, too: DistributedDataParallel asks the others first."""
    two = World(0, 2, 0, 2, torch.device("cpu"))
    error = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error")
    said = r"process 0 lost the others while they set up: one of them died"
    with pytest.raises(RunError, match=said), together(two, 10, "while they set up"):
        raise error
    with pytest.raises(RuntimeError, match=r"^shape"), together(two, 10, "there"):
        raise RuntimeError("shape mismatch")


def test_a_full_memory_that_nccl_tells_is_no_lost_process(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(tmp_path)
    two = World(0, 2, 0, 2, torch.device("cpu"))
    learner = build_learner(settings, 10, ALONE)
    learner.model.eval()
    plan = plan_run(settings, small.train_samples)[0]
    for said, found in (
        (
            "ncclUnhandledCudaError: Cuda failure 2 'out of memory'",
            "is out of memory in the validation",
        ),
        ("ncclRemoteError: connection closed by peer", "process 0 lost the others"),
    ):
        with pytest.raises(RunError, match=found), explained(learner, plan, two, 16, 1.0):
            raise torch.distributed.DistBackendError(said)

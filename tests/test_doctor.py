"""The doctor's page on machines that are mocked, and on this one; what a run says at its start."""

import json
import os
import resource
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffcv_imnet.machine import checks
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine.checks import FAIL, OK, WARN
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.machine.host import Nvidia, keep_compilations
from ffcv_imnet.tools import doctor
from tests.test_device import one_card

Usage = namedtuple("Usage", "total used free")
ON_GPU = World(0, 1, 0, 1, torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's rate costs seconds."""
    monkeypatch.setattr(doctor, "read_rate", lambda folder: checks.Finding("disk reads", "1 GB/s"))


def verdicts(said: str) -> dict[str, str]:
    """Of the page's lines, by what they are of."""
    rows = [(line[:4].strip(), line[6:].split("  ")[0]) for line in said.splitlines()]
    return {what: verdict for verdict, what in rows if verdict in (OK, WARN, FAIL)}


def test_on_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--dir", str(tmp_path), "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "training runs on the CPU" in said and f"torch {torch.__version__.split('+')[0]}" in said
    assert len(verdicts(said)) == 14 and FAIL not in verdicts(said).values()
    lines = [line for line in said.splitlines() if str(tmp_path) not in line]  # a path stays whole
    assert max(map(len, lines)) <= doctor.WIDTH
    assert doctor.main(["--dir", str(tmp_path), "--device=cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["would_train"] is True and report["versions"]["python"]
    assert {"what", "found", "verdict", "advice"} == report["findings"][0].keys()


def test_an_old_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    old = Nvidia(("Tesla T4",), "535.104.05", True)
    monkeypatch.setattr(doctor, "find_nvidia", lambda: old)
    monkeypatch.setattr(devices, "find_nvidia", lambda: old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert (verdicts(said)["driver"], verdicts(said)["GPUs"]) == (WARN, FAIL)
    assert "535.104.05; torch (CUDA 13.2) needs 580.65 or newer" in said
    assert "Training would fail here" in said
    assert doctor.main(["--device=cpu"]) == 0


def test_a_card_that_torch_has_no_code_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_card(monkeypatch, "Tesla V100-SXM2-16GB", (7, 0))
    volta = Nvidia(("Tesla V100-SXM2-16GB",), "580.82.07", True)
    monkeypatch.setattr(doctor, "find_nvidia", lambda: volta)

    def refuses() -> int:
        raise RuntimeError("cuDNN version 92600 is not compatible with devices with SM < 7.5")

    monkeypatch.setattr(torch.backends.cudnn, "version", refuses)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert verdicts(said)["GPUs"] == FAIL
    assert "compute capability 7.0, only for 7.5, 8.0" in " ".join(said.split())


def test_a_gpu_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What only a GPU answers is answered for it."""
    one_card(monkeypatch, "NVIDIA H100", (9, 0))
    monkeypatch.setattr(doctor, "find_nvidia", lambda: Nvidia(("NVIDIA H100",), "580.82.07", True))
    monkeypatch.setattr(
        devices, "describe", lambda _: "NVIDIA H100, 79 GiB, compute capability 9.0"
    )
    monkeypatch.setattr(devices, "pinned_buffer", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(devices, "copy_rate", lambda device, host: 25.2)
    monkeypatch.setattr(devices, "fault_of", lambda device: None)
    monkeypatch.setattr(devices, "free_share", lambda device: 0.99)
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert {verdicts(said)[what] for what in ("driver", "GPUs", "pinned memory")} == {OK}
    assert "25.2 GB/s to the GPU" in said and "auto is bf16" in said

    def refused(size: int) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(devices, "pinned_buffer", refused)
    assert doctor.main([]) == 0
    assert verdicts(capsys.readouterr().out)["pinned memory"] == WARN


def test_a_torch_that_was_not_tested_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.versions().verdict == "ok"
    monkeypatch.setattr(torch, "__version__", "2.8.0a0+34c6371d24.nv25.8")
    found = doctor.versions()
    assert found.verdict == "warn" and found.advice.startswith("torch before 2.11 was not tested")


def test_a_forgotten_torchrun_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one_card(monkeypatch, "NVIDIA H100", (9, 0))
    monkeypatch.setattr(devices, "pinned_buffer", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr("sys.argv", ["train_imagenet.py", "--config", "my recipe.yaml"])
    checks.say_at_start(ON_GPU, tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    checks.say_at_start(ON_GPU, tmp_path)
    said = capsys.readouterr().err
    command = "torchrun --nproc_per_node=8 train_imagenet.py --config 'my recipe.yaml'"
    assert said == f"GPUs used: 1 of 8: all of them: {command}\n"
    checks.say_at_start(replace(ON_GPU, device=torch.device("cpu")), tmp_path)
    assert capsys.readouterr().err == ""


def test_what_a_container_withholds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker's 64 MB of /dev/shm, 256 open files, a full disk, a folder of somebody else's."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert checks.shared_memory(1).verdict == OK
    assert (
        checks.shared_memory(8).verdict == WARN and "--ipc=host" in checks.shared_memory(8).advice
    )
    assert checks.disk(tmp_path / "runs/new").verdict == FAIL
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(int(1e12), 0, int(2e9)))
    assert checks.disk(tmp_path).verdict == WARN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(int(1e12), 0, int(5e11)))
    assert checks.shared_memory(8).verdict == checks.disk(tmp_path).verdict == OK
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert checks.disk(tmp_path).verdict == FAIL
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert (checks.open_files().verdict, checks.open_files().advice) == (WARN, "ulimit -n 1024")
    monkeypatch.setattr(checks, "quota_cores", lambda: 2.5)
    assert "a quota of 2.5" in checks.cores().found


def test_what_torch_compile_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for kind, verdict in (("cpu", WARN), ("cuda", FAIL)):
        assert checks.compiler(torch.device(kind)).verdict == verdict
    assert "a C++ compiler" in checks.compiler(torch.device("cpu")).found


def test_compiled_code_outlives_a_spot_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    keep_compilations(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine" and not list(tmp_path.iterdir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compilations(tmp_path)
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert Path(cache_dir()).is_relative_to(tmp_path / ".inductor")


def test_every_gpu_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a computation ends well where a device is: here the CPU stands for one."""
    assert devices.fault_of(torch.device("cpu")) is None
    assert devices.fault_of(torch.device("meta", 0)) is None
    monkeypatch.setattr(devices, "count", lambda: 3)
    monkeypatch.setattr(devices, "fault_of", lambda device: None)
    monkeypatch.setattr(devices, "free_share", lambda device: 0.99)
    assert checks.each_gpu().verdict == OK
    monkeypatch.setattr(devices, "free_share", lambda device: 0.25 if device.index == 1 else 0.99)
    found = checks.each_gpu()
    assert (found.verdict, found.found) == (WARN, "GPU 1: 25% of its memory is free")
    monkeypatch.setattr(devices, "fault_of", lambda device: "no" if device.index == 2 else None)
    found = checks.each_gpu()
    assert (found.verdict, found.found) == (FAIL, "GPU 2: no")

"""The device: what a machine's files say of its cards and cores, and which device is then chosen."""

import os
from pathlib import Path

import pytest
import torch

from ffcv_imnet.config.parsing import parse
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine import host
from ffcv_imnet.machine.host import Nvidia, available_memory, find_nvidia, quota_cores, why_unusable

OLD = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    """A tree of files in the place of /."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


BUS = {
    "sys/bus/pci/devices/0000:00:03.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:00:03.0/class": "0x030200\n",  # a T4: 3D controller
    "sys/bus/pci/devices/0000:00:04.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:00:04.0/class": "0x040300\n",  # a graphics card's sound
    "sys/bus/pci/devices/0000:00:05.0/vendor": "0x1af4\n",
    "sys/bus/pci/devices/0000:00:05.0/class": "0x030000\n",  # another maker's screen
}
DRIVER = {
    "proc/driver/nvidia/version": OLD,
    "proc/driver/nvidia/gpus/0000:00:03.0/information": "Model: \t\t Tesla T4\nIRQ:   33\n",
}
NODE = {"dev/nvidia0": ""}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, Nvidia()),
        (BUS, Nvidia(("NVIDIA card",), None, False)),
        (BUS | DRIVER, Nvidia(("Tesla T4",), "535.104.05", False)),  # docker run without --gpus
        (BUS | DRIVER | NODE, Nvidia(("Tesla T4",), "535.104.05", True)),
        (
            NODE | {"proc/driver/nvidia/version": OPEN},
            Nvidia(("NVIDIA card",), "580.82.07", True),
        ),
    ],
)
def test_cards_and_driver_are_found_without_torch(
    files: dict[str, str], wanted: Nvidia, tmp_path: Path
) -> None:
    assert find_nvidia(machine(tmp_path, files)) == wanted
    assert bool(wanted) == bool(files)


T4 = Nvidia(("Tesla T4",), "580.82.07", True)


@pytest.mark.parametrize(
    ("found", "cuda", "visible", "said"),
    [
        (Nvidia(("T4",), "535.104.05", True), "13.2", None, "535.104.05, .* needs 580.65 or newer"),
        (Nvidia(("T4",), "535.104.05", True), "12.8", None, "run nvidia-smi"),  # new enough
        (Nvidia(("T4",), "570.1.0", False), "14.0", None, "there is no /dev/nvidia0"),
        (Nvidia(("T4",), None, False), "13.2", None, "no NVIDIA driver is loaded"),
        (Nvidia(("T4",), "580.82.07", False), "13.2", None, "--gpus all"),
        (T4, "13.2", "", "CUDA_VISIBLE_DEVICES is ''"),
        (T4, "13.2", "-1", "CUDA_VISIBLE_DEVICES is '-1'"),
        (T4, "13.2", "0", "run nvidia-smi"),
        (T4, "13.2", "7", "CUDA_VISIBLE_DEVICES is '7'"),
        (T4, None, None, "was built without CUDA"),
    ],
)
def test_why_a_card_is_not_usable(
    found: Nvidia, cuda: str | None, visible: str | None, said: str
) -> None:
    import re

    assert re.search(said, why_unusable(found, "2.15.0", cuda, visible))


def test_a_card_that_torch_cannot_use_is_no_silent_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old driver of a rented machine: auto and cuda refuse, cpu says nothing."""
    old = Nvidia(("Tesla T4",), "535.104.05", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "find_nvidia", lambda: old)
    for setting in ("auto", "cuda"):
        with pytest.raises(UsageError, match=r"1 x Tesla T4.*535.*580.*--device=cpu") as refused:
            devices.choose(setting)
        assert refused.value.status == 2 and "\n" not in str(refused.value)
    assert devices.choose("cpu") == torch.device("cpu")
    monkeypatch.setattr(devices, "find_nvidia", Nvidia)
    assert devices.choose("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="no NVIDIA card"):
        devices.choose("cuda")


WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 0), WHEEL, False),  # V100
        ((7, 5), WHEEL, True),
        ((8, 9), WHEEL, True),  # L4: the machine code of 8.6
        ((9, 0), WHEEL, True),
        ((9, 1), WHEEL, False),  # sm_90a is for 9.0 alone
        ((10, 3), WHEEL, True),
        ((11, 0), WHEEL, False),
        ((12, 1), WHEEL, True),
        ((15, 0), WHEEL, True),  # PTX is compiled for what comes later
        ((7, 0), [], True),
        ((9, 4), ["gfx90a", "gfx942"], True),
        ((7, 0), ["compute_60"], True),
    ],
)
def test_which_cards_a_wheel_has_code_for(
    capability: tuple[int, int], archs: list[str], runs: bool
) -> None:
    assert devices.has_code(capability, archs) is runs


def one_card(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """torch.cuda as on a machine with one card of that kind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: WHEEL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


def test_a_card_without_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one_card(monkeypatch, "Tesla V100-SXM2-16GB", (7, 0))
    with pytest.raises(UsageError, match=r"no code for Tesla V100.* 7\.0, only for 7\.5, 8\.0"):
        devices.choose("auto")
    assert devices.choose("cpu") == torch.device("cpu")
    one_card(monkeypatch, "Tesla T4", (7, 5))
    assert devices.choose("auto") == torch.device("cuda", 0)
    with pytest.raises(UsageError, match="at most one process a GPU"):
        devices.choose("auto", local_rank=1, local_size=2)


@pytest.mark.parametrize(
    ("named", "wanted"),
    [("cuda", "cuda:2"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("cuda:4", None)],
)
def test_a_device_without_a_number(
    named: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.set_device, which the loader's thread calls, takes none."""
    one_card(monkeypatch, "Tesla T4", (7, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    if wanted is None:
        with pytest.raises(UsageError, match="device cuda:4: torch can use 4 GPUs here"):
            devices.numbered(torch.device(named), "--device=cpu")
    else:
        assert devices.numbered(torch.device(named), "--device=cpu") == torch.device(wanted)


def test_the_device_is_a_setting_with_a_short_name(tmp_path: Path) -> None:
    assert parse([]).settings.training.device == "auto"
    assert parse(["--device=cpu"]).settings.training.device == "cpu"
    (tmp_path / "c.yaml").write_text("device: cuda\ntraining: {epochs: 3}\n")
    settings = parse(["--config", str(tmp_path / "c.yaml")]).settings
    assert (settings.training.device, settings.training.epochs) == ("cuda", 3)
    with pytest.raises(UsageError, match=r"line: device must be one of auto, cuda, cpu"):
        parse(["--device=gpu"])


# ---- cores --------------------------------------------------------------------------------------

V2, POD = "0::/\n", "0::/kubepods/burstable/pod1\n"
V1 = "9:name=systemd:/\n3:cpuset:/\n1:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 16),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": POD,
                "sys/fs/cgroup/kubepods/burstable/pod1/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/kubepods/cpu.max": "400000 100000\n",  # the tightest counts
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    ],
)
def test_the_quota_of_a_container(
    files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    assert quota_cores(machine(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, None),
        ({"proc/meminfo": "MemAvailable:  2000 kB\n"}, 2_048_000),
        (  # a container sees its own group as the mount itself
            {
                "proc/meminfo": "MemAvailable: 2000 kB\n",
                "sys/fs/cgroup/memory.max": "1000000\n",
            },
            1_000_000,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 2000 kB\n",
                "proc/self/cgroup": "9:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
                "sys/fs/cgroup/cpu/memory.limit_in_bytes": "7\n",
            },
            1_000_000,
        ),
        (  # "max": no limit; those above count too
            {
                "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 2000 kB\n",
                "proc/self/cgroup": "0::/pod/part\n",
                "sys/fs/cgroup/pod/part/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": "1000000\n",
            },
            1_000_000,
        ),
    ],
)
def test_the_memory_of_a_container(
    files: dict[str, str], memory: int | None, tmp_path: Path
) -> None:
    assert available_memory(machine(tmp_path, files)) == memory


@pytest.mark.parametrize(
    ("quota", "usable"), [(None, 96), (16.0, 16), (0.5, 1), (2.5, 3), (200.0, 96)]
)
def test_cores_are_what_the_quota_pays_for(
    quota: float | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 decoders on 16 cores' time would wait for each other in a pod."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(host, "quota_cores", lambda: quota)
    assert host.usable_cores() == usable

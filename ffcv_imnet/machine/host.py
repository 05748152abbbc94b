"""What the kernel says of this machine: NVIDIA cards and their driver, cores by affinity and by quota, memory.

Read from /proc and /sys, so that it works where torch sees nothing. `root` is another tree in tests.
"""

import math
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ffcv_imnet.core.provenance import cpu_name

ROOT = Path("/")
NVIDIA = "0x10de"  # its vendor number on the PCI bus
DISPLAY = "0x03"  # the PCI class of display controllers: VGA 0x0300, 3D 0x0302
# The oldest Linux driver of each CUDA major version, any minor:
# docs.nvidia.com/deploy/cuda-compatibility, "minor version compatibility".
OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}


@dataclass(frozen=True)
class Nvidia:
    """NVIDIA's cards and driver as the kernel shows them, which a container may do without lending any."""

    cards: tuple[str, ...] = ()  # models; "NVIDIA card" where only the bus knows it
    driver: str | None = None  # version of the kernel module that is loaded
    nodes: bool = False  # /dev has what a process opens to use a card

    def __bool__(self) -> bool:
        return bool(self.cards)


def find_nvidia(root: Path = ROOT) -> Nvidia:
    """The cards of this machine; milliseconds, unless only nvidia-smi is left to be asked."""
    driver = _driver(root)
    nodes = any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev/dxg").exists()  # dxg: WSL 2
    models = [_model(path) for path in sorted((root / "proc/driver/nvidia/gpus").glob("*"))]
    if not models:
        models = ["NVIDIA card"] * sum(map(_is_card, (root / "sys/bus/pci/devices").glob("*")))
    if not models and not driver and root == ROOT:
        return _ask_nvidia_smi(nodes)
    if not models and nodes:
        models = ["NVIDIA card"]
    return Nvidia(tuple(models), driver, nodes)


def _driver(root: Path) -> str | None:
    for path in (root / "sys/module/nvidia/version", root / "proc/driver/nvidia/version"):
        if found := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _read(path)):
            return found[0]
    return None


def _model(path: Path) -> str:
    """The card of a folder of /proc/driver/nvidia/gpus."""
    found = re.search(r"^Model:\s*(.+?)\s*$", _read(path / "information"), re.MULTILINE)
    return found[1] if found else "NVIDIA card"


def _is_card(device: Path) -> bool:
    vendor, kind = _read(device / "vendor"), _read(device / "class")
    return vendor.strip() == NVIDIA and kind.startswith(DISPLAY)


def _ask_nvidia_smi(nodes: bool) -> Nvidia:
    """WSL 2 has neither /proc/driver/nvidia nor the card on its bus."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return Nvidia(nodes=nodes)
    question = [command, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(question, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return Nvidia(nodes=nodes)
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not rows:
        return Nvidia(nodes=nodes)
    return Nvidia(tuple(name for _, name in rows), rows[0][0], nodes)


def oldest_driver(cuda: str) -> str | None:
    """The oldest driver for a torch built with CUDA `cuda` ("13.2"); None if this file does not know it."""
    return OLDEST_DRIVER.get(int(cuda.split(".")[0]))


def is_older(version: str, than: str) -> bool:
    """Compared number by number: 535.104 is older than 580.65."""
    ours, theirs = ([int(part) for part in text.split(".")[:2]] for text in (version, than))
    return ours < theirs


def why_unusable(found: Nvidia, torch: str, cuda: str | None, visible: str | None) -> str:
    """Why torch cannot use the cards of `found`, and what to do, for the end of a sentence.

    Args:
        torch: its version.
        cuda: the CUDA version that it was built with; None for a build without.
        visible: the environment's CUDA_VISIBLE_DEVICES; None if unset.
    """
    if cuda is None:
        return f"torch {torch} was built without CUDA: install a build with it"
    if visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides all: unset it or name the cards"
    needed = oldest_driver(cuda)
    needs = f"{needed} or newer" if needed else "a newer one"
    wants = f"torch {torch} (CUDA {cuda}) needs {needs}"
    if found.driver is None:
        return f"no NVIDIA driver is loaded, and {wants}: install it"
    if needed and is_older(found.driver, needed):
        return f"the NVIDIA driver is {found.driver}, and {wants}: update it"
    if not found.nodes:
        return (
            "there is no /dev/nvidia0: start the container with --gpus all (docker run --gpus all)"
        )
    if visible is not None and visible.strip() != "0":
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, and {len(found.cards)} are there: name those"
    return (
        f"the NVIDIA driver is {found.driver}, and {wants}: run nvidia-smi; if it names an error, "
        f"restart the machine or its driver"
    )


def keep_compilations(runs: Path) -> None:
    """Let torch.compile keep its code in `runs`/.inductor, for the next start, unless the environment says where.

    Its own choice is /tmp, which a spot machine takes along. The code is for this kind of processor.
    """
    folder = runs / ".inductor" / f"{zlib.crc32(cpu_name().encode()):08x}"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with suppress(OSError):  # read-only: torch's own choice remains
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


# ---- cores --------------------------------------------------------------------------------------


def core_numbers() -> list[int]:
    """The cores this process may run on at all, ascending."""
    return sorted(os.sched_getaffinity(0))


def affinity_cores() -> int:
    """How many these are; numba and FFCV refuse more threads."""
    return len(os.sched_getaffinity(0))


def quota_cores(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the control group allows (Docker's --cpus, a pod's limit); None: no limit.

    Of all groups above this process the tightest counts.
    """
    limits = []
    for folder in _groups(root, "cpu", ("cpu", "cpu,cpuacct", "cpuacct,cpu")):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        limits.append(_cores(quota, period))
        quota = _read(folder / "cpu.cfs_quota_us")
        limits.append(_cores(quota, _read(folder / "cpu.cfs_period_us")))
    return min((limit for limit in limits if limit is not None), default=None)


def usable_cores() -> int:
    """Cores that this process can keep busy: of those it may run on, as many as its quota pays for."""
    quota = quota_cores()
    return min(affinity_cores(), math.ceil(quota)) if quota is not None else affinity_cores()


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that the page cache may still take, and no more than a control group allows; None if unknown."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"))
    if found is None:
        return None
    limits = [
        _read(folder / name).strip()
        for folder in _groups(root, "memory", ("memory",))
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min([int(found[1]) * 1024, *(int(limit) for limit in limits if limit.isdigit())])


def _groups(root: Path, controller: str, mounts: tuple[str, ...]) -> Iterator[Path]:
    """The folders of this process's control groups that may limit `controller`, and of those above them.

    `mounts` is where version 1 has it. In a container the own group may be the mount itself.
    """
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and controller not in controllers.split(","):
            continue
        group = PurePosixPath(path)
        for mount in ("", "unified") if number == "0" else mounts:
            for above in (group, *group.parents):
                if ".." not in above.parts:
                    yield root / "sys/fs/cgroup" / mount / str(above).lstrip("/")


def _cores(quota: str, period: str) -> float | None:
    """Microseconds of every `period`, as cores; None for "max", -1 and what is no number."""
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""What can be wrong with a machine before it trains: one finding a line, with a verdict and what to do.

`python -m ffcv_imnet doctor` prints all of them; a run at its start those of `at_start`, which take
milliseconds.
"""

import os
import resource
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.optional import is_there
from ffcv_imnet.core.units import of_disk, of_memory
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.machine.host import (
    Nvidia,
    affinity_cores,
    is_older,
    oldest_driver,
    quota_cores,
    usable_cores,
)

OK, WARN, FAIL = "ok", "warn", "FAIL"
OTHERS_LEAVE = 0.9  # of a GPU's memory, where nobody else trains on it
SHM = Path("/dev/shm")
SHM_NEEDED = (
    1 << 30
)  # bytes; several processes' NCCL lays its buffers there, and Docker gives 64 MiB
FILES_NEEDED = 1024  # sockets, checkpoints, decoders: a few hundred for eight processes
DISK_LOW, DISK_NONE = 5e9, 0.75e9  # bytes; a checkpoint of ResNet-50 under SOAP is 0.73 GB


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    what: str
    found: str
    verdict: str = OK
    advice: str = ""  # what to do, where the verdict is another


def at_start(world: World, folder: Path) -> Iterator[Finding]:
    """What a run says of its machine when it starts, once its device is chosen and current."""
    yield idle_gpus(world)
    yield shared_memory(world.local_size if world.device.type == "cuda" else 1)
    yield open_files()
    yield disk(folder)
    if world.device.type == "cuda":
        yield pinned(world.device)


def say_at_start(world: World, folder: Path) -> None:
    """Print what of `at_start` is not well."""
    for finding in at_start(world, folder):
        if finding.verdict != OK:
            print(f"{finding.what}: {finding.found}: {finding.advice}", file=sys.stderr, flush=True)


def driver(found: Nvidia) -> Finding:
    """The NVIDIA driver against the CUDA version that torch was built with."""
    cuda = torch.version.cuda
    if cuda is None:
        return Finding("driver", f"{found.driver or 'none'}; torch was built without CUDA")
    needed = oldest_driver(cuda)
    needs = f"torch (CUDA {cuda}) needs {f'{needed} or newer' if needed else 'a newer one'}"
    if found.driver is None:
        return Finding("driver", f"none is loaded; with a card {needs}")
    if needed and is_older(found.driver, needed):
        return Finding("driver", f"{found.driver}; {needs}", WARN, "update the driver")
    return Finding("driver", f"{found.driver}; {needs}")


def gpus(found: Nvidia, setting: str) -> Finding:
    """The cards that the kernel shows, those that torch sees, and whether it has code for them."""
    seen = f"{len(found.cards)} x {found.cards[0]} in the machine" if found else "no NVIDIA card"
    try:
        device = devices.choose(setting)
    except UsageError as error:
        return Finding("GPUs", seen, FAIL, str(error))
    if device.type == "cpu":
        return Finding("GPUs", f"{seen}; training runs on the CPU")
    archs = devices.readable(devices.archs())
    text = f"{seen}, {devices.count()} for torch: {devices.describe(device)}; torch has code for {archs}"
    return Finding("GPUs", text)


def each_gpu() -> Finding:
    """Whether every GPU computes, and has its memory to itself: several processes train on all of them."""
    faults, shared = list[str](), list[str]()
    for number in range(devices.count()):
        device = torch.device("cuda", number)
        free = devices.free_share(device)  # before this process takes its part
        if fault := devices.fault_of(device):
            faults.append(f"GPU {number}: {fault[:100]}")
        elif free < OTHERS_LEAVE:
            shared.append(f"GPU {number}: {free:.0%} of its memory is free")
    if faults:
        advice = "restart it, or leave it out with CUDA_VISIBLE_DEVICES"
        return Finding("each GPU", "; ".join(faults), FAIL, advice)
    if shared:
        return Finding("each GPU", "; ".join(shared), WARN, "see nvidia-smi for whose it is")
    return Finding("each GPU", "computes, and its memory is free")


def idle_gpus(world: World) -> Finding:
    """GPUs of this machine that no process of this run uses: torchrun was forgotten."""
    there = devices.count() if world.device.type == "cuda" else 0
    if there <= world.local_size:
        return Finding("GPUs used", f"{world.local_size if there else 0} of {there}")
    command = shlex.join(["torchrun", f"--nproc_per_node={there}", *sys.argv])
    return Finding("GPUs used", f"{world.local_size} of {there}", WARN, f"all of them: {command}")


def cores() -> Finding:
    """Cores by affinity and by quota."""
    quota, may = quota_cores(), affinity_cores()
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    return Finding("cores", f"{usable_cores()} used: {may} by affinity, {limit}")


def shared_memory(gpus: int) -> Finding:
    """/dev/shm, through which the processes of several GPUs exchange gradients."""
    try:
        size = shutil.disk_usage(SHM).total
    except OSError as error:
        size, text = 0, f"missing ({error.strerror})"
    else:
        text = of_memory(size)
    if gpus > 1 and size < SHM_NEEDED:
        advice = f"{gpus} processes need {of_memory(SHM_NEEDED)}: docker run --ipc=host"
        return Finding("/dev/shm", text, WARN, advice)
    return Finding("/dev/shm", text)


def open_files() -> Finding:
    """The limit on open files and sockets of one process."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,}"
    if limit != resource.RLIM_INFINITY and limit < FILES_NEEDED:
        raised = FILES_NEEDED if most == resource.RLIM_INFINITY else min(FILES_NEEDED, most)
        return Finding("open files", text, WARN, f"ulimit -n {raised}")
    return Finding("open files", text)


def disk(folder: Path) -> Finding:
    """Free space where `folder` is or will be."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding("disk", f"{there}: {error.strerror}", FAIL, "name a folder that can be read")
    text = f"{of_disk(free)} free at {there}"
    if not os.access(there, os.W_OK):
        return Finding("disk", f"{text}, not writable", FAIL, "name a folder of your own")
    if free < DISK_NONE:
        return Finding("disk", text, FAIL, "make room: a run keeps three checkpoints")
    if free < DISK_LOW:
        return Finding("disk", text, WARN, "make room: a run keeps three checkpoints")
    return Finding("disk", text)


def pinned(device: torch.device) -> Finding:
    """Whether host memory can be pinned. FFCV takes pageable memory, silently, where it cannot."""
    try:
        devices.pinned_buffer(1 << 20)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:100]
        return Finding(
            "pinned memory", reason, WARN, "copies to the GPU will be slow: ulimit -l unlimited"
        )
    return Finding("pinned memory", "can be had")


def compiler(device: torch.device) -> Finding:
    """What torch.compile calls: a C++ compiler for the CPU; Triton, a C compiler and Python's headers for a GPU."""
    if device.type == "cpu":
        wanted = {"a C++ compiler (build-essential)": os.environ.get("CXX") or "g++"}
        missing = [what for what, command in wanted.items() if shutil.which(command) is None]
    else:
        commands = (os.environ.get("CC"), "gcc", "clang")
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        there = {
            "triton": is_there("triton"),
            "a C compiler (build-essential)": any(c and shutil.which(c) for c in commands),
            "Python.h (python3-dev)": headers.exists(),
        }
        missing = [what for what, found in there.items() if not found]
    if missing:
        # On a GPU the recipes for ImageNet compile, and a run would end in its first step.
        verdict = WARN if device.type == "cpu" else FAIL
        advice = "install it, or train with --training.compile=false"
        return Finding("torch.compile", f"without {', '.join(missing)}", verdict, advice)
    return Finding("torch.compile", "has its compiler")

"""The device: whatever names torch.cuda stands in this file.

`choose` takes `training.device` and never falls back to the processor where an NVIDIA card is there:
a machine with one is rented by the hour.
"""

import os
import re
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.names import number_of
from ffcv_imnet.core.provenance import cpu_name
from ffcv_imnet.machine.host import find_nvidia, why_unusable

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(
    setting: str, local_rank: int = 0, local_size: int = 1, on_cpu: str = "--device=cpu"
) -> torch.device:
    """The device of `local_rank` among this machine's processes.

    Args:
        setting: "auto" (a GPU, or the CPU where no NVIDIA card is), "cuda" or "cpu".
        on_cpu: how the caller's user asks for the CPU.

    Raises:
        UsageError: a card is there, or asked for, that torch cannot use; or one that it has no code
            for; or more processes than cards.
    """
    if setting == "cpu":
        return CPU
    purpose = f"or take the CPU on purpose: {on_cpu}"
    if not usable():
        found = find_nvidia()
        if not found and setting == "auto":
            return CPU
        if not found:
            raise UsageError(f"device cuda: the kernel shows no NVIDIA card; {on_cpu} works here")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = why_unusable(found, torch.__version__, torch.version.cuda, visible)
        cards = f"{len(found.cards)} x {found.cards[0]}"
        raise UsageError(f"torch cannot use this machine's GPU ({cards}): {why}, {purpose}")
    if local_size > count():
        raise UsageError(
            f"torchrun --nproc_per_node={local_size}, but this machine has {count()} GPUs: start at "
            f"most one process a GPU"
        )
    device = torch.device("cuda", local_rank)
    if not has_code(capability(device), archs()):
        raise UsageError(
            f"torch {torch.__version__} has no code for {name(device)}, compute capability "
            f"{dotted(capability(device))}, only for {readable(archs())}: take another card, or a torch "
            f"that was built for this one, {purpose}"
        )
    return device


def usable() -> bool:
    """Whether torch can use a GPU. Its warning of an old driver is left to `choose`, which has the words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def count() -> int:
    """GPUs that torch may use."""
    return torch.cuda.device_count() if usable() else 0


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability: (7, 5) for a T4, (8, 0) for an A100, (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


def archs() -> list[str]:
    """What torch was built for: sm_75, compute_120...; nothing in a build without CUDA."""
    return torch.cuda.get_arch_list()


def has_code(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether a torch built for `archs` (sm_75, compute_120, sm_90a...) runs on a card of `capability`.

    Machine code (sm) runs on its own minor version and later ones of the same major, PTX (compute)
    on everything later; with a letter neither does (CUDA C++ Programming Guide, 5.1). A build that
    names none of these (ROCm's) is believed.
    """
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in archs]
    parsed = [match for match in matches if match is not None]
    for match in parsed:
        kind, letter = match[1], match[4]
        built = int(match[2]), int(match[3])
        if letter == "a":
            fits = built == capability
        elif kind == "compute" and not letter:
            fits = built <= capability
        else:
            fits = built[0] == capability[0] and built[1] <= capability[1]
        if fits:
            return True
    return not parsed


def dotted(capability: tuple[int, int]) -> str:
    """(7, 5) as 7.5."""
    return "{}.{}".format(*capability)


def readable(archs: Sequence[str]) -> str:
    """`archs` as compute capabilities: 7.5, 8.0, 12.0."""
    numbers = (re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[af]?", arch) for arch in archs)
    return ", ".join(dict.fromkeys(f"{found[1]}.{found[2]}" for found in numbers if found))


def choose_precision(setting: str, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16": the setting, or for "auto" what the device computes natively.

    CUDA: bf16 from compute capability 8.0 (Ampere), fp16 from 7.0 (a T4 reports bf16 as supported
    but emulates it), else fp32. CPU: bf16 with AMX or AVX512-BF16, else fp32.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        major, _ = capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.8 has none
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def name(device: torch.device) -> str:
    """The accelerator's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {number_of(torch.get_num_threads(), 'thread')}"


def make_current(device: torch.device) -> None:
    """What this thread does without naming a device is done on this one. Each thread has its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def current(device: torch.device) -> AbstractContextManager[object]:
    """`make_current`, for a while."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def numbered(device: torch.device, on_cpu: str) -> torch.device:
    """`device`, if it can be used; the current one of this thread for "cuda" without a number, as torch has it.

    Raises:
        UsageError: see `choose`; or there are fewer cards.
    """
    if device.type != "cuda":
        return device
    choose("cuda", on_cpu=on_cpu)
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= count():
        raise UsageError(f"device {device}: torch can use {number_of(count(), 'GPU')} here")
    return device


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes allocated on the accelerator since the last `reset_peak_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def room(device: torch.device) -> int:
    """Bytes free on an accelerator, with what this process has already."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def fault_of(device: torch.device) -> str | None:
    """What a small product, a convolution and their backward pass end in on an accelerator; None if all is well."""
    try:
        images = torch.ones(8, 3, 16, 16, device=device, requires_grad=True)
        kernel = torch.ones(4, 3, 3, 3, device=device)
        features = torch.nn.functional.conv2d(images, kernel).flatten(1)
        (features @ features.mT).sum().backward()
        synchronise(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def free_share(device: torch.device) -> float:
    """The part of an accelerator's memory that nobody uses."""
    free, total = torch.cuda.mem_get_info(device)
    return free / total


class Copies:
    """Batches from page-locked host memory to a GPU, on a stream of their own, so that one is copied while the step
    on the one before is made.

    Two places on the device take turns. A batch is copied to one when the step that last used it is done, which
    keeps the host at most two steps ahead; the host's own memory is free again once `wait` returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.compute, self.side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        # The host sleeps until it comes; a plain one is spun on, on a core that has images to decode.
        self.copied = torch.cuda.Event(blocking=True)
        self.used = torch.cuda.Event(), torch.cuda.Event()
        self.places: list[list[Tensor]] = []
        self.number = 0

    def start(self, *batch: Tensor) -> list[Tensor]:
        """What `batch` becomes on the device, for what is queued from here on; valid until the next one starts.
        The first batch is the largest."""
        place, before = self.number % 2, (self.number + 1) % 2
        if self.number == 0:
            self.places = [[torch.empty_like(t, device=self.device) for t in batch] for _ in "ab"]
            self.side.wait_stream(
                self.compute
            )  # which may still be using what the memory was before
        else:
            self.used[before].record(self.compute)  # behind the last step
        if self.number >= 2:
            self.side.wait_event(self.used[place])
        self.number += 1
        there = [memory[: len(t)] for memory, t in zip(self.places[place], batch, strict=True)]
        with torch.cuda.stream(self.side):
            for target, t in zip(there, batch, strict=True):
                target.copy_(t, non_blocking=True)
        self.copied.record(self.side)
        self.compute.wait_event(self.copied)
        return there

    def wait(self) -> None:
        """Until the last copy is done, which is long before the step behind it is."""
        self.copied.synchronize()

    def is_done(self, seconds: float) -> bool:
        """Whether the last copy is, within so many: it never is where another process died in a step before."""
        deadline = time.monotonic() + seconds
        while not self.copied.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True


def copies_to(device: torch.device) -> Copies | None:
    """How batches get to `device`; None where it reads the host's memory."""
    return Copies(device) if device.type == "cuda" else None


def describe(device: torch.device) -> str:
    """An accelerator's name, memory and compute capability. Makes a CUDA context."""
    free, total = (count / 2**30 for count in torch.cuda.mem_get_info(device))
    able = f"compute capability {dotted(capability(device))}"
    return f"{name(device)}, {total:.0f} GiB ({free:.0f} free), {able}"


def pinned_buffer(size: int) -> Tensor:
    """`size` bytes of page-locked host memory. Raises RuntimeError where none is to be had."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def copy_rate(device: torch.device, host: Tensor, times: int = 10) -> float:
    """GB/s from `host` memory to an accelerator."""
    there = torch.empty_like(host, device=device)
    there.copy_(host)
    synchronise(device)
    started = time.perf_counter()
    for _ in range(times):
        there.copy_(host, non_blocking=True)
    synchronise(device)
    return times * host.nbytes / (time.perf_counter() - started) / 1e9


def library_versions() -> dict[str, str]:
    """CUDA's, cuDNN's and NCCL's that torch was built with; none of a build without CUDA."""
    if torch.version.cuda is None:
        return {}
    found = {"CUDA": torch.version.cuda}
    # It refuses a card older than cuDNN's oldest, of which `choose` says more.
    with suppress(RuntimeError):
        if cudnn := torch.backends.cudnn.version():
            major, rest = divmod(cudnn, 10_000)
            found["cuDNN"] = f"{major}.{rest // 100}.{rest % 100}"
    if torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found

"""Look at this machine: driver, GPUs, cores, memory, disk, compilers; one page to paste into an issue.

    python -m ffcv_imnet doctor
    python -m ffcv_imnet doctor --dir /mnt/disk --json

Exit status 1 if training would fail here. Takes seconds, and needs neither data nor a GPU.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ffcv_imnet.core import provenance
from ffcv_imnet.core.paths import path_of
from ffcv_imnet.core.units import of_disk, of_memory
from ffcv_imnet.machine import checks
from ffcv_imnet.machine import device as devices
from ffcv_imnet.machine.checks import FAIL, WARN, Finding
from ffcv_imnet.machine.host import available_memory, find_nvidia
from ffcv_imnet.native import build
from ffcv_imnet.tools import ToolParser

PROBE = 128 << 20  # bytes written and read again to measure a disk
BLOCK = 4 << 20
SECONDS = 1.2  # at most, of writing, and again of reading
SLOW_DISK = (
    100e6  # bytes a second; 2,000 images/s of 40 kB are 80 MB/s, until memory holds the file
)
OLDEST_TORCH = 2, 11  # pyproject.toml has the same
WIDTH = 100  # columns of the page


def main(argv: list[str]) -> int:
    """Print the page. Exit status 0, or 1 if training would fail."""
    parser = ToolParser("doctor", __doc__)
    parser.add_device()
    parser.add_argument("--dir", type=path_of, default=Path(), metavar="DIR",
                        help="where data and runs lie: its disk is measured (default: here)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(argv)
    findings = list(examine(options.device, options.dir))
    failed = any(finding.verdict == FAIL for finding in findings)
    if options.json:
        print(json.dumps({
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "would_train": not failed,
            "versions": provenance.versions() | devices.library_versions(),
            "git_commit": provenance.git_commit(),
            "findings": [asdict(finding) for finding in findings],
        }, indent=1))  # fmt: skip
    else:
        print(page(findings))
    return int(failed)


def examine(setting: str, folder: Path) -> Iterator[Finding]:
    """All findings, in the order of the page.

    Args:
        setting: as `training.device`.
        folder: where data and runs lie.
    """
    found = find_nvidia()
    yield Finding("machine", f"{provenance.cpu_name()}, {platform.system()} {platform.release()}")
    yield versions()
    yield checks.driver(found)
    cards = checks.gpus(found, setting)
    yield cards
    on_gpu = setting != "cpu" and cards.verdict != FAIL and devices.usable()
    device = torch.device("cuda", 0) if on_gpu else devices.CPU
    if on_gpu:
        yield checks.each_gpu()
        yield copies(device)
    yield Finding("precision", f"auto is {devices.choose_precision('auto', device)} here")
    yield checks.cores()
    yield Finding("memory", f"{of_memory(available_memory() or 0)} to be had")
    yield checks.shared_memory(devices.count() if on_gpu else 1)
    yield checks.open_files()
    yield checks.disk(folder)
    yield read_rate(folder)
    yield loader()
    yield decoder()
    yield checks.compiler(device)


def versions() -> Finding:
    """Of what a result depends on."""
    found = provenance.versions()
    wanted = {str(n): found[n] for n in ("python", "torch", "ffcv", "numba") if n in found}
    wanted |= devices.library_versions()
    if commit := provenance.git_commit():
        wanted["commit"] = commit.replace(commit[12:40], "")
    text = ", ".join(f"{name} {number}" for name, number in wanted.items())
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release and (int(release[1]), int(release[2])) < OLDEST_TORCH:
        oldest = "{}.{}".format(*OLDEST_TORCH)
        advice = (
            f"torch before {oldest} was not tested with this: take a newer one if something fails"
        )
        return Finding("versions", text, WARN, advice)
    return Finding("versions", text)


def copies(device: torch.device) -> Finding:
    """Whether batches are copied to the GPU from pinned memory, and how fast."""
    finding = checks.pinned(device)
    pageable = devices.copy_rate(device, torch.empty(64 << 20, dtype=torch.uint8))
    if finding.verdict != checks.OK:
        return Finding(
            finding.what, f"{finding.found}; pageable {pageable:.1f} GB/s", WARN, finding.advice
        )
    fast = devices.copy_rate(device, devices.pinned_buffer(64 << 20))
    return Finding(finding.what, f"{fast:.1f} GB/s to the GPU (pageable: {pageable:.1f} GB/s)")


def read_rate(folder: Path) -> Finding:
    """The disk's, from a file written for it and dropped from the page cache; seconds at most."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            room = min(PROBE, shutil.disk_usage(folder).free // 10)
            written, rate = _measured(file.fileno(), room)
    except OSError as error:
        advice = "name a folder that can be written, with --dir"
        return Finding("disk reads", f"not measured ({error.strerror})", WARN, advice)
    text = f"{of_disk(rate)}/s, in order, {of_disk(written)}"
    if rate < SLOW_DISK:
        advice = "2,000 images/s are 80 MB/s until memory holds the .beton: a faster disk, or more memory"
        return Finding("disk reads", text, WARN, advice)
    return Finding("disk reads", text)


def _measured(file: int, size: int) -> tuple[int, float]:
    """Bytes written, and bytes a second of reading them."""
    block, written, started = os.urandom(BLOCK), 0, time.perf_counter()
    while written < size and time.perf_counter() - started < SECONDS:
        written += os.write(file, block)
        os.fdatasync(file)  # what is not on the disk yet cannot be dropped
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(file, 0, os.SEEK_SET)
    read, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < SECONDS and (got := len(os.read(file, BLOCK))):
        read += got
    return written, read / max(taken, 1e-9)


def loader() -> Finding:
    """Whether ffcv, with OpenCV and libjpeg-turbo behind it, loads."""
    try:
        with contextlib.redirect_stdout(None):
            import ffcv_imnet.data.loader  # noqa: F401
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        return Finding(
            "ffcv", f"does not load: {reason}", FAIL, "bash setup.sh names what it needs"
        )
    return Finding("ffcv", "loads")


def decoder() -> Finding:
    """Whether images are decoded by the crop or whole."""
    if build.load() is None:
        advice = "images are decoded whole, which is slower: python -m ffcv_imnet.native.build"
        return Finding("crop decoder", "not compiled", WARN, advice)
    return Finding("crop decoder", f"compiled: {build.library_path().name}")


def wrapped(text: str, first: str, others: str) -> list[str]:
    """Lines of `WIDTH` columns behind these margins; options and paths stay whole."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def page(findings: list[Finding]) -> str:
    """A line a finding, its advice below it, and a verdict at the end."""
    label = max(len(finding.what) for finding in findings)
    margin = " " * (8 + label)
    lines = [f"ffcv-imnet doctor, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC", ""]
    for finding in findings:
        head = f"{finding.verdict:>4}  {finding.what:{label}}  "
        lines += wrapped(finding.found, head, margin)
        lines += wrapped(finding.advice, f"{margin}-> ", f"{margin}   ")
    counted = {verdict: sum(f.verdict == verdict for f in findings) for verdict in (FAIL, WARN)}
    if counted[FAIL]:
        end = (
            f"Training would fail here: see {'FAIL' if counted[FAIL] == 1 else 'each FAIL'} above."
        )
    elif counted[WARN]:
        end = f"Training will run; {counted[WARN]} warning{'s' * (counted[WARN] > 1)} above."
    else:
        end = "Training will run."
    return "\n".join([*lines, "", end])

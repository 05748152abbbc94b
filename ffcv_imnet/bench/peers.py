"""Loaders in alternation, each in a process of its own: how they are started, measured and compared."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ffcv_imnet.bench.loaders import NEEDS, PEERS, Spec
from ffcv_imnet.core.errors import RunError
from ffcv_imnet.core.optional import is_there
from ffcv_imnet.core.progress import Progress
from ffcv_imnet.data.beton import read_sample, read_tables

READ_BETON = "ffcv_imnet", "ffcv+CropDecoder", "ffcv"  # the others read files
READ_FILES = "torchvision", "dali", "spdl"


def installed(jpegs: bool) -> list[str]:
    """The loaders that can run here; those that read JPEG files only where the .beton stores such."""
    there = [name for name in PEERS if name not in NEEDS or is_there(NEEDS[name])]
    return [name for name in there if jpegs or name in READ_BETON]


def unpack(beton: Path, folder: Path) -> None:
    """The stored JPEGs as files, a folder a class: the same bytes for the loaders that read files. An image that is
    there more than once has more names, not more bytes, as in the .beton."""
    tables = read_tables(beton)
    there = dict[int, Path]()
    with beton.open("rb") as file:
        for i, label in enumerate(tables.labels):
            (folder / f"{label:04}").mkdir(exist_ok=True)
            path = folder / f"{label:04}" / f"{i:08}.jpg"
            first = there.setdefault(int(tables.pointers[i]), path)
            if first == path:
                path.write_bytes(read_sample(file, tables, i))
            else:
                path.hardlink_to(first)


class Peer:
    """A loader in its process (`ffcv_imnet.bench.loaders`), perhaps held to some `cores`, whose numbers these are."""

    def __init__(self, name: str, spec: Spec, cores: Sequence[int] = ()) -> None:
        self.name = name
        command = [sys.executable, "-m", "ffcv_imnet.bench.loaders", name, json.dumps(asdict(spec))]
        if cores:  # before the first thread is there
            command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        # They decode into the host's memory; a context on a GPU would count as theirs.
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def one_pass(self, resolution: int, min_crop: float = 0.08) -> dict[str, Any]:
        """What the process says of one pass. Raises RunError with its last words if it ended or made no image."""
        assert self.process.stdin and self.process.stdout
        line = ""
        if self.process.poll() is None:
            self.process.stdin.write(f"{resolution} {min_crop}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line or "{}")
        if not answer.get("images"):  # SPDL notes that FFmpeg is missing, and makes empty batches
            self.process.kill()
            self.process.wait()
            self.errors.seek(0)
            words = self.errors.read().strip().splitlines() or ["no message"]
            raise RunError(f"the loader {self.name} failed: {words[-1][:300]}")
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@dataclass(frozen=True, order=True)
class Case:
    """What all loaders do in alternation."""

    resolution: int  # px
    min_crop: float  # least area of a crop over that of its image
    cores: int  # decoding threads; where processes are pinned, cores too


Answer = dict[str, Any]  # of one pass, see `bench.loaders`
Passes = dict[Case, dict[str, list[Answer]]]  # by loader


def measure(
    peers: dict[tuple[str, int], Peer],
    cases: Sequence[Case],
    rounds: int,
    passes: Passes,
    done: Callable[[], None],
) -> None:
    """Fill `passes` with `rounds` of every case that it lacks; an unmeasured one before. The loaders take turns,
    and so do their numbers of cores.

    Args:
        peers: by loader and cores.
        done: called when another resolution and crop is complete.
    """
    missing = [case for case in cases if case not in passes]
    groups: dict[tuple[int, float], list[Case]] = {}
    for case in missing:
        groups.setdefault((case.resolution, case.min_crop), []).append(case)
    names = dict.fromkeys(name for name, _ in peers)
    total = len(missing) * (rounds + 1) * len(names)
    with Progress(total, "benchmark", "pass") as progress:
        for (resolution, min_crop), group in groups.items():
            found: Passes = {case: {name: [] for name in names} for case in group}
            for number in range(rounds + 1):
                for name, case in itertools.product(names, group):
                    answer = peers[name, case.cores].one_pass(resolution, min_crop)
                    if number:
                        found[case][name].append(answer)
                    progress.update(1, f"{name} {resolution} px")
            passes.update(found)
            done()


def rates(runs: Sequence[Answer]) -> list[float]:
    """Images/s of each pass."""
    return [run["images"] / run["seconds"] for run in runs]


def ratio(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float | None:
    """The median of the rounds' own ratios: what slows a round slows all its loaders. None without rounds."""
    pairs = zip(rates(ours), rates(theirs), strict=False)
    ratios = [a / b for a, b in pairs]
    return round(statistics.median(ratios), 3) if ratios else None


def summarise(passes: Passes) -> list[dict[str, Any]]:
    """One row a loader and case: median images/s, by wall clock and of CPU time, spread (max - min over median), ratios
    to stock FFCV, to libjpeg-turbo alone and to fewest cores, memory."""
    rows = []
    for case, found in passes.items():
        fewest = min(c for c in passes if replace(c, cores=case.cores) == case)
        for name, runs in found.items():
            own = rates(runs)
            median = statistics.median(own)
            row = {
                "loader": name,
                **asdict(case),
                "images_per_second": round(median, 1),
                "spread": round((max(own) - min(own)) / median, 4),
                "images_per_cpu_second": round(
                    statistics.median(run["images"] / run["cpu_seconds"] for run in runs), 1
                ),
                "ratio_to_stock": ratio(runs, found.get("ffcv", [])),
                "ratio_to_limit": ratio(runs, found.get("turbojpeg", [])),
                "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
            }
            if fewest != case:
                row["growth"] = ratio(runs, passes[fewest].get(name, []))
            rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person."""
    columns = (
        "loader", "px", "crops from", "cores", "images/s", "a core", "of CPU time", "spread",
        "x stock", "of limit", "x fewest cores", "peak memory",
    )  # fmt: skip

    def shown(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    lines = [
        (
            row["loader"],
            row["resolution"],
            f"{row['min_crop']:g}",
            row["cores"],
            f"{row['images_per_second']:,.0f}",
            f"{row['images_per_second'] / row['cores']:,.0f}",
            f"{row['images_per_cpu_second']:,.0f}",
            f"{row['spread']:.1%}",
            shown(row, "ratio_to_stock", ".2f"),
            shown(row, "ratio_to_limit", ".0%"),
            shown(row, "growth", ".2f"),
            f"{row['peak_memory_bytes'] / 1e6:,.0f} MB",
        )
        for row in rows
    ]
    return tabulate(lines, columns, disable_numparse=True, stralign="right")


def listed(passes: Passes) -> list[dict[str, Any]]:
    """Every single pass, for JSON."""
    return [
        {"loader": name, **asdict(case), **run}
        for case, found in passes.items()
        for name, runs in found.items()
        for run in runs
    ]


def unlisted(entries: Sequence[dict[str, Any]]) -> Passes:
    """The inverse."""
    passes: Passes = {}
    for entry in entries:
        run = dict(entry)
        case = Case(*(run.pop(field) for field in ("resolution", "min_crop", "cores")))
        passes.setdefault(case, {}).setdefault(run.pop("loader"), []).append(run)
    return passes

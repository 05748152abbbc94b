"""Make the study's runs, or say how far it is.

PYTHONPATH=. python records/2026-11-25_transfer/study.py run --data DIR --workers 2
PYTHONPATH=. python records/2026-11-25_transfer/study.py status

DIR holds what pack.py wrote: DIR/tiny100, DIR/imagenette. Each run appends one line to log.jsonl beside this
file (or --log) and is skipped if its line is there. Stop it at any time, kill -9 included: only the runs under way
are lost. A run is claimed by a lock that the kernel drops with its process, so workers may come and go.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import experiment
import plan
import torch
from experiment import Run

HERE = Path(__file__).parent
SECONDS = {"rn18": 0.0004, "rn50": 0.0011}  # CPU seconds an image at a quarter of the width, 40 px


def read(log: Path) -> dict[Run, dict[str, Any]]:
    """Each run's line; a torn last one does not count."""
    known = {field.name for field in fields(Run)}
    out = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        out[Run(**{name: v for name, v in row["run"].items() if name in known})] = row
    return out


def top_1(rows: dict[Run, dict[str, Any]]) -> dict[Run, float]:
    """What brackets are closed by: the last epoch's, over both halves; 0 for a run that failed."""
    return {
        run: 0.0 if failed(row) else sum(row["curve"]["top_1"][-1]) / 2 for run, row in rows.items()
    }


def failed(row: dict[str, Any]) -> bool:
    """Diverged, or ended in an exception."""
    return row.get("diverged", False) or "error" in row


def cost(run: Run) -> float:
    """CPU seconds, roughly, for the budget."""
    per_image = SECONDS[run.net] * (run.width / 0.25) ** 1.7 * (run.px / 40) ** 2
    return run.epochs * (run.images * per_image * (1.3 if run.batch < 256 else 1) + 2)


def append(log: Path, row: dict[str, Any]) -> None:
    """One line in one write, on its own line whatever a killed writer left."""
    torn = log.exists() and log.stat().st_size and log.read_bytes()[-1:] != b"\n"
    with log.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def claims(log: Path) -> Path:
    """The folder of locks for this log."""
    name = hashlib.sha256(str(log.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"transfer-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def lock(path: Path, wait: bool) -> IO[str] | None:
    """An open, locked file; None if another process has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


def choose(log: Path) -> tuple[Run, str, IO[str]] | bool:
    """The next run with its part and its lock; True: others are on it, False: nothing is left."""
    turn = lock(claims(log) / "choose", wait=True)
    assert turn
    with turn:
        marks, busy = top_1(read(log)), False
        for cell in plan.cells():
            for run in plan.next_runs(cell, marks):
                name = hashlib.sha256(json.dumps(asdict(run)).encode()).hexdigest()[:16]
                held = lock(claims(log) / name, wait=False)
                if held:
                    return run, f"{cell.part}: {cell.name}", held
                busy = True
        return busy


def machine() -> dict[str, Any]:
    """For the log: times of a shared machine are not comparable, top-1 is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": cpu or platform.machine(), "cores": os.cpu_count(), "threads": 1,
            "torch": torch.__version__}  # fmt: skip


def work(data: Path, log: Path, parent: int, shared: bool) -> None:
    """Make runs until none is left."""
    sets: dict[str, tuple[experiment.Images, experiment.Images]] = {}

    def alive() -> None:
        if os.getppid() != parent:
            sys.exit("the study's first process is gone; so is this worker")

    while (chosen := choose(log)) is not False:
        alive()
        if chosen is True:
            time.sleep(10)
            continue
        run, what, held = chosen
        print(f"{time.strftime('%H:%M:%S')} {what} lr={run.lr} seed={run.seed}", flush=True)
        if run.data not in sets:
            folder = data / run.data
            sets[run.data] = experiment.load(folder, "train"), experiment.load(folder, "val")
        try:
            row = experiment.train(run, *sets[run.data], alive)
        except RuntimeError as error:
            if run.optimizer not in plan.ADAPTIVE:
                raise
            # A rival's own failure is a result; the study goes on.
            row = {"run": asdict(run), "error": f"{type(error).__name__}: {error}"[:300]}
        commit = os.environ.get("TRANSFER_COMMIT", "")
        row |= machine() | {"shared": shared, "load": os.getloadavg()[1], "commit": commit}
        append(log, row)
        held.close()


def start(options: argparse.Namespace) -> int:
    """One process a worker; they end with this one."""
    for name in ("tiny100", "imagenette"):
        if not (options.data / name / "train_images.npy").exists():
            sys.exit(f"{options.data / name} has no packed images; see pack.py")
    for name in ("schedulefree", "pytorch_optimizer"):
        if find_spec(name) is None:
            sys.exit(f"{name} is missing: pip install schedulefree pytorch-optimizer")
    only = lock(claims(options.log) / "study", wait=False)
    if only is None:
        sys.exit(f"a study is already writing {options.log}")
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    environment = os.environ | {"TRANSFER_COMMIT": commit, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "worker", "--data", str(options.data), "--log", str(options.log),
               "--parent", str(os.getpid()), *(["--shared"] if options.shared else [])]  # fmt: skip
    workers = [subprocess.Popen(command, env=environment) for _ in range(options.workers)]
    return max(worker.wait() for worker in workers)


def status(log: Path) -> None:
    """Each cell: what is done, what it wants now; and the CPU-hours behind and, roughly, ahead."""
    rows = read(log)
    marks, ahead = top_1(rows), 0.0
    for cell in plan.cells():
        points, wants = plan.scored(cell, marks), plan.next_runs(cell, marks)
        state = "done" if not wants else "open" if points else "not begun"
        if not wants and cell.points > 1 and plan.lacking(points, cell.margin):
            state = "done, not bracketed"
        shown = " ".join(f"{lr:g}:{value:.1%}" for lr, value in points.items())
        print(f"{state:9} {cell.part:12} {cell.name:60} {shown}")
        runs = max(len(wants), 3.7 + (cell.seeds - 1) * cell.again - len(points)) if wants else 0
        ahead += cost(cell.run) * runs
    behind = sum(row.get("cpu_seconds", 0.0) for row in rows.values())
    print(f"\n{len(rows)} runs, {behind / 3600:.1f} CPU-hours; about {ahead / 3600:.0f} ahead")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "status", "worker"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--log", type=Path, default=HERE / "log.jsonl")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--shared", action="store_true", help="others use this machine: say so in the log"
    )
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command == "status":
        status(options.log)
    elif options.data is None:
        parser.error("--data is missing: the folder that pack.py filled")
    elif options.command == "worker":
        work(options.data, options.log, options.parent, options.shared)
    else:
        return start(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

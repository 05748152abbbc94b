"""Faults from outside a run: a file truncated under its map, a full disk, a rank that stops or dies."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.core.log import read_log
from tests.conftest import SmallData
from tests.faults.lives import PATIENCE, ROOT, Life, Row, changes_of, same_run, train, train_config
from tests.test_training import FULL

LONG = {"training__epochs": 50, "training__batch_size": 2, "training__checkpoint_minutes": 1e-9}


def copy_of(data: SmallData, folder: Path) -> SmallData:
    """The same files in another folder, to be damaged there."""
    folder.mkdir(parents=True)
    for path in (data.train, data.val):
        for name in (path, path.with_suffix(".json")):
            shutil.copy(name, folder / name.name)
    return SmallData(
        folder / data.train.name, folder / data.val.name, data.train_samples, data.val_samples
    )


def row_of(kind: str, injected: str, life: Life, names: str, since: float, lost: str) -> Row:
    """What a life said that had to end: with status 1, in one line that has `names` in it, in time."""
    status = life.end()
    seconds = time.perf_counter() - since
    said = life.error()
    well = status == 1 and seconds < PATIENCE and names in said and "Traceback" not in life.said()
    what = "hung" if status is None else f"status {status} after {seconds:.0f} s: {said[:160]}"
    return Row(kind, injected, what, lost if well else "?", well)


def truncated(data: SmallData, folder: Path) -> list[Row]:
    """A .beton truncated while it is trained on, and one that is replaced, which harms nobody."""
    own = copy_of(data, folder / "cut")
    life = train(own.settings(folder / "cut_run", **LONG))
    checkpoints = changes_of(folder / "cut_run/last.pt")
    life.until(lambda: checkpoints() >= 3)
    since = time.perf_counter()
    os.truncate(own.train, own.train.stat().st_size // 4)
    cut = row_of(
        "map",
        ".beton truncated in training",
        life,
        "train.beton",
        since,
        "the steps since the last checkpoint",
    )

    own = copy_of(data, folder / "replaced")
    life = train(own.settings(folder / "replaced_run", training__epochs=3))
    checkpoints = changes_of(folder / "replaced_run/last.pt")
    life.until(lambda: checkpoints() >= 1)
    shutil.copy(own.val, folder / "other")
    (folder / "other").replace(own.train)
    status, said = life.end(), "was replaced or deleted" in life.said()
    well = status == 0 and said
    what = (
        f"status {status}, {'said' if said else 'NOT SAID'}: trained on with the file it had open"
    )
    return [cut, Row("map", ".beton replaced in training", what, "nothing" if well else "?", well)]


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[bool]:
    """A tmpfs at `place`; False where this process may not mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def full_disk(data: SmallData, folder: Path, whole: Path) -> list[Row]:
    """A disk that fills during a run; then there is room again, and the run ends as `whole` did."""
    with small_disk(folder / "disk", "16m") as mounted:
        run = folder / "disk/run"
        run.parent.mkdir(exist_ok=True)
        settings = data.settings(run, **FULL)
        if not mounted:
            # A process may write no file larger than this: as far as a write can tell, a full disk.
            limit = (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        life = train(settings)
        if mounted:
            life.until(lambda: (run / "last.pt").exists())
            fill(folder / "disk/filler")
        how = "a tmpfs" if mounted else "RLIMIT_FSIZE: no tmpfs could be mounted"
        row = row_of(
            "disk",
            f"a disk that is full ({how})",
            life,
            str(run),
            time.perf_counter(),
            "the epoch in hand",
        )
        if mounted:
            (folder / "disk/filler").unlink()
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
        status = train(settings, "--resume", "auto").end()
        well = status == 0 and same_run(run, whole)
        what = f"status {status}, {'equal bit for bit' if well else 'DIFFERENT'}"
    return [row, Row("disk", "room again, --resume auto", what, "nothing" if well else "?", well)]


def ranks(data: SmallData, folder: Path, number: int) -> list[Row]:
    """Two processes, gloo; the second gets a signal that stops or kills it."""
    name = signal.Signals(number).name
    timeout = 3.0
    settings = data.settings(folder / f"rank_{name}", **LONG, distributed__timeout_seconds=timeout)
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    first = train(settings, RANK="0", LOCAL_RANK="0", **world)
    config = folder / f"rank_{name}.yaml"
    words = folder / f"rank_{name}_1"  # its own words
    second = train_config(
        config,
        words,
        f"--logging.folder={settings.logging.folder}",
        RANK="1",
        LOCAL_RANK="1",
        **world,
    )
    checkpoints = changes_of(Path(settings.logging.folder) / "last.pt")
    first.until(lambda: checkpoints() >= 2)
    since = time.perf_counter()
    second.send(number)
    row = row_of(
        "rank",
        f"{name} of one of two ranks",
        first,
        "distributed.timeout_seconds",
        since,
        "the steps since the last checkpoint",
    )
    if second.alive():
        second.send(signal.SIGKILL)
        second.end()
    return [row]


def nodes(data: SmallData, folder: Path) -> list[Row]:
    """Two "machines", a torchrun each; one vanishes with its process, and comes back as a scheduler
    would bring it back. By hand only: eight starts of torch."""
    port = free_port()
    settings = data.settings(
        folder / "nodes",
        training__epochs=6,
        training__checkpoint_minutes=1e-9,
        distributed__timeout_seconds=30,
    )
    config = folder / "nodes.yaml"
    config.write_text(to_yaml(settings))
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=1"]
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--max_restarts=5",
    ]
    words += [*rendezvous, "-m", "tests.networks", "--config", str(config), "--resume", "auto"]

    alone = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/SCALING.md

    def node(number: int) -> "subprocess.Popen[bytes]":
        with (folder / f"node{number}.txt").open("ab") as out:
            return subprocess.Popen(
                words, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=alone
            )

    first = node(1)
    time.sleep(3)  # the first to come hosts the rendezvous, and is not the one to vanish
    second = node(2)
    log = folder / "nodes/log.jsonl"
    while second.poll() is None and not (log.exists() and '"type": "epoch"' in log.read_text()):
        time.sleep(0.01)
    vanish(second.pid)
    second = node(2)
    status = first.wait(600), second.wait(600)
    epochs = [epoch.epoch for epoch in read_log(log).epochs]
    starts = len(read_log(log).headers)
    well = status == (0, 0) and epochs == list(range(6)) and starts >= 2
    what = f"status {status}, {starts} starts, epochs {epochs}"
    return [
        Row(
            "nodes",
            "kill -9 of one of two torchruns and its process",
            what,
            "the step in hand" if well else "?",
            well,
        )
    ]


def vanish(pid: int) -> None:
    """kill -9 of a process and its children, which torchrun puts into sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

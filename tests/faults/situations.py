"""Odd surroundings: limits, closed streams, stopped and killed processes, worlds that are too large.

    python -m tests.faults --only worlds phases stops surroundings limits classes

Each is a run of its own, forked where the situation can begin after the imports. Well is: it goes on as if
nothing were, or ends in one sentence with status 1 or 2, in bounded time, and loses nothing that was announced.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import train_imagenet
import write_ffcv
from ffcv_imnet.config.parsing import to_yaml
from ffcv_imnet.core.errors import RunError, UsageError, run_main
from ffcv_imnet.core.log import read_log
from ffcv_imnet.data import beton
from ffcv_imnet.train.run_dir import RunFolder
from tests.conftest import SmallData
from tests.faults.lives import PATIENCE, Life, Row, changes_of, open_data, same_run, train
from tests.faults.outside import LONG, free_port
from tests.pictures import make_slow_tree, make_tree, picture, save
from tests.test_training import FULL

Prepare = Callable[[], object]
ENDS = (0, 1, 2)


def life_of(prepare: Prepare, main: Callable[[], int | None], words: Path) -> Life:
    """`main` in a process that `prepare` has changed."""

    def both() -> None:
        prepare()
        run_main(main)  # as a process that was started so

    return Life(both, words)


def training(data: SmallData, folder: Path, *more: str, **overrides: object) -> Callable[[], int]:
    """Two epochs of training in `folder`."""
    config = folder.with_suffix(".yaml")
    config.write_text(to_yaml(data.settings(folder, **overrides)))

    def main() -> int:
        sys.argv = ["train_imagenet.py", "--config", str(config), *more]
        return train_imagenet.main()

    return main


def writing(images: Path, out: Path, *more: str) -> Callable[[], int]:
    """write_ffcv.py of a small tree."""
    words = f"--split train --data_dir {images} --out_dir {out} --num_workers 1".split()
    return lambda: write_ffcv.main([*words, *more])


def fault_of(status: int | None, said: str) -> str | None:
    """What is not one sentence, or an end without a word that went well."""
    if status is None:
        return "hung"
    if status not in ENDS:
        return f"status {status}"
    if "Traceback" in said:
        return "a traceback"
    return "not one sentence" if said.count("error: ") != (status != 0) else None


def row(kind: str, injected: str, life: Life, also: str | None = None, limit: float = 300) -> Row:
    """Of a life that may end well or in a sentence."""
    status = life.end(limit)
    fault = fault_of(status, life.said()) or also
    seconds = time.perf_counter() - life.started
    said = "went on" if status == 0 else f"status {status}: {life.error()[:200]}"
    happened = f"{said} ({seconds:.0f} s)" + (f"; {fault}" if fault else "")
    return Row(kind, injected, happened, "nothing" if not fault else "?", not fault)


# ---- limits -------------------------------------------------------------------------------------


def limits(data: SmallData, folder: Path) -> Iterator[Row]:
    """RLIMIT_NOFILE, FSIZE and AS, in training and writing; what was there before is kept."""
    images = make_tree(folder / "limited_images", (3, 2))
    address = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    tried = [("NOFILE", resource.RLIMIT_NOFILE, n) for n in (8, 16, 24, 32, 64, 128)]
    tried += [("FSIZE", resource.RLIMIT_FSIZE, n) for n in (0, 1000, 20_000, 100_000, 1 << 20)]
    tried += [("AS", resource.RLIMIT_AS, address + (n << 20)) for n in (0, 16, 64, 256, 1024)]
    for name, number, value in tried:
        for what in ("training", "writing"):
            own = folder / f"{name}_{value}_{what}"
            main = training(data, own) if what == "training" else writing(images, own)
            life = life_of(lower(number, value), main, own.with_suffix(".txt"))
            status = life.end(300)
            also = half_written(own)
            shown = f"{value - address >> 20} MB more than at the start" if name == "AS" else value
            if (name, value) == ("FSIZE", 0):  # what it says is a file, too
                well = status in ENDS and not also
                yield Row(what, "RLIMIT_FSIZE 0", f"status {status}", "nothing", well)
            else:
                yield row(what, f"RLIMIT_{name} {shown}", life, also)
            again = training(data, own, "--resume", "auto") if what == "training" else main
            second = life_of(lambda: None, again, own.with_suffix(".txt"))
            if status and second.end(300):
                yield row(what, f"RLIMIT_{name} {shown}, then without", second)


def lower(number: int, value: int) -> Prepare:
    """Set a soft limit."""
    return lambda: resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


def half_written(folder: Path) -> str | None:
    """What a failure left that it should not."""
    if left := [path.name for path in folder.rglob("*.partial")]:
        return f"left {left}"
    with_manifest = [p for p in folder.rglob("*.beton") if beton.manifest_path(p).exists()]
    try:
        for path in with_manifest:
            beton.check_beton(path)
        if (folder / "log.jsonl").exists():
            read_log(folder)
    except (RunError, UsageError) as error:
        return str(error)
    return None


# ---- streams, places, another user --------------------------------------------------------------


def surroundings(data: SmallData, folder: Path) -> Iterator[Row]:
    """Streams that are gone, places that cannot be written, a user without rights, a clock that jumps."""
    images = make_tree(folder / "odd_images", (3, 2))
    for name, prepare in PREPARATIONS.items():
        for what in ("training", "writing"):
            own = folder / f"odd_{name.replace(' ', '_').replace('/', '_')}_{what}" / "out"
            own.parent.mkdir(mode=0o777)
            own.parent.chmod(0o777)
            main = training(data, own) if what == "training" else writing(images, own)
            life = life_of(prepare, main, own.with_suffix(".txt"))
            status = life.end(300)
            quiet = "streams" in name or "stderr" in name
            also = half_written(own) if own.exists() else None
            if quiet and status in ENDS:  # it cannot say anything
                yield Row(what, name, f"status {status}", "nothing", status == 0 and not also)
            else:
                yield row(what, name, life, also)


def nobody() -> None:
    """Another user, in no group."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def jumping(seconds: float) -> Prepare:
    """time.time() that jumps by so much every other call."""

    def prepare() -> None:
        real, calls = time.time, [0]

        def jumps() -> float:
            calls[0] += 1
            return real() + seconds * (calls[0] % 2)

        time.time = jumps

    return prepare


def closed(*streams: int) -> Prepare:
    """File descriptors that are closed, as `<&- >&- 2>&-` leaves them."""
    return lambda: list(map(os.close, streams))


PREPARATIONS: dict[str, Prepare] = {
    "closed stdin": closed(0),
    "closed stdout": closed(1),
    "closed stderr": closed(2),
    "all streams closed": closed(0, 1, 2),
    "stdout to /dev/full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "stderr to /dev/full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 2),
    "no HOME": lambda: os.environ.pop("HOME", None),
    "TMPDIR that is not there": lambda: os.environ.update(TMPDIR="/not/there"),
    "an empty environment": os.environ.clear,
    "another user": nobody,
    "umask 777": lambda: os.umask(0o777),
    "a clock that jumps back an hour": jumping(-3600),
    "a clock that jumps on a year": jumping(365 * 86400),
}


# ---- stopped, killed, two at once ---------------------------------------------------------------


def stops(data: SmallData, folder: Path, whole: Path) -> Iterator[Row]:
    """SIGSTOP and SIGCONT, a lost terminal, two processes on one output."""
    run = folder / "stopped"
    life = train(data.settings(run, **FULL, training__checkpoint_minutes=1e-9))
    checkpoints = changes_of(run / "last.pt")
    for wanted in (1, 4, 9):
        life.until(lambda n=wanted: checkpoints() >= n)  # type: ignore[misc]
        life.send(signal.SIGSTOP)
        time.sleep(2)
        life.send(signal.SIGCONT)
    status = life.end(300)
    same = status == 0 and same_run(run, whole)
    happened = f"status {status}, " + ("the result is the same" if same else "DIFFERS")
    yield Row("training", "SIGSTOP and SIGCONT, three times", happened, "nothing", same)

    run = folder / "hung_up"
    first = train(data.settings(run, **LONG))
    checkpoints = changes_of(run / "last.pt")
    first.until(lambda: checkpoints() >= 2)
    second = train(data.settings(run, **LONG), "--resume", "auto")
    yield row("training", "a second run in the folder of a run that goes on", second)
    first.send(signal.SIGHUP)
    status = first.end(60)
    well = status == 128 + signal.SIGHUP and "stopped by SIGHUP" in first.said()
    yield Row("training", "SIGHUP", f"status {status}: {first.said().splitlines()[-1]}", "-", well)

    images = make_slow_tree(folder / "slow_images", 60)
    lives = [Life(writing(images, folder / "both"), folder / f"both{n}.txt") for n in (0, 1)]
    statuses = [life.end(300) for life in lives]
    said = next((life.error() for life in lives if life.status), "")
    well = sorted(map(str, statuses)) == ["0", "2"] and "another write_ffcv.py" in said
    beton.check_beton(folder / "both/train.beton")
    yield Row("writing", "two at once in one folder", f"status {statuses}: {said}", "nothing", well)


# ---- several processes --------------------------------------------------------------------------


def pair(
    data: SmallData, folder: Path, size: int = 2, *more: str, patch: Prepare = lambda: None,
    **overrides: object,
) -> list[Life]:  # fmt: skip
    """Training by `size` processes on this machine; `patch` changes the last of them."""
    overrides = {"distributed__timeout_seconds": 10.0, **overrides}
    main = training(data, folder, *more, **overrides)
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    lives = []
    for rank in range(size):
        own = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}

        def both(own: dict[str, str] = own, last: bool = rank == size - 1) -> int:
            os.environ.update(own)
            if last:
                patch()
            return main()

        lives.append(Life(both, folder.with_name(f"{folder.name}_{rank}.txt")))
    return lives


def killing(owner: object, name: str, after: int = 0) -> Prepare:
    """This process is killed when it calls that for the `after`-th time."""

    def prepare() -> None:
        calls = [0]
        real = getattr(owner, name)

        def dies(*arguments: object, **named: object) -> object:
            calls[0] += 1
            if calls[0] > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(owner, name, dies)

    return prepare


PHASES: dict[str, Prepare] = {
    "checking the data": killing(train_imagenet, "check_data"),
    "before it connects": killing(train_imagenet, "connect"),
    "before the network is built": killing(train_imagenet, "build_learner"),
    "the first step": killing(train_imagenet, "train_epoch"),
    "validation": killing(train_imagenet, "validate"),
    "saving": killing(RunFolder, "save"),
    "the second epoch": killing(train_imagenet, "train_epoch", after=1),
    "finishing": killing(RunFolder, "finish"),
}


def phases(data: SmallData, folder: Path) -> Iterator[Row]:
    """kill -9 of the second of two processes in each phase: the first ends in a sentence, and a resume works."""
    for name, patch in PHASES.items():
        run = folder / f"phase_{name.replace(' ', '_')}"
        first, second = pair(data, run, patch=patch)
        second.end(120)
        since = time.perf_counter()
        status = first.end(PATIENCE)
        seconds = time.perf_counter() - since
        fault = fault_of(status, first.said())
        lives = pair(data, run, 2, "--resume", "auto")
        again = [life.end(120) for life in lives]
        epochs = [epoch.epoch for epoch in read_log(run).epochs] if again == [0, 0] else again
        well = fault is None and epochs == [0, 1]
        happened = f"status {status} after {seconds:.0f} s: {first.error()[:160]}"
        happened += "" if well else f"; {fault}; then {epochs}"
        yield Row("ranks", f"kill -9 of one of two: {name}", happened, "the step in hand", well)


def worlds(folder: Path) -> Iterator[Row]:
    """One to three processes with seven images, and validation smaller than the world."""
    root = folder / "seven"
    for split, counts in (("train", (4, 3)), ("val", (1, 1))):
        make_tree(root / "images", counts, split)
        words = f"--split {split} --data_dir {root}/images --out_dir {root} --num_workers 1"
        life = Life(lambda words=words: write_ffcv.main(words.split()), folder / "seven.txt")  # type: ignore[misc]
        if life.end() != 0:
            raise RuntimeError(life.error())
    data = open_data(root)
    for size in (1, 2, 3):
        for batch in (6, 7, 12):
            run = folder / f"seven_{size}_{batch}"
            lives = pair(data, run, size, training__batch_size=batch, validation__batch_size=4)
            statuses = [life.end(120) for life in lives]
            faults = [fault_of(s, life.said()) for s, life in zip(statuses, lives, strict=True)]
            fault = next(filter(None, faults), None)
            if not any(statuses):
                epochs = read_log(run).epochs
                said = f"trained, top-1 {epochs[-1].top_1:g} of 2 images"
            else:
                said = f"status {statuses}: {lives[0].error()[:160]}"
            injected = f"{size} processes, 7 and 2 images, batch {batch}"
            yield Row("ranks", injected, said + f" {fault or ''}", "nothing", fault is None)


def classes(folder: Path) -> Iterator[Row]:
    """Five thousand classes of an image each, half of them without validation."""
    root = folder / "many"
    first = root / "first.jpg"
    save(first, picture(1, 40, 40))
    for split, count in (("train", 5000), ("val", 2500)):
        for number in range(5000):
            (own := root / f"images/{split}/{number:04d}").mkdir(parents=True)
            if number < count:
                os.link(first, own / "x.jpg")
        words = f"--split {split} --data_dir {root}/images --out_dir {root} --num_workers 2"
        life = Life(lambda words=words: write_ffcv.main(words.split()), folder / "many.txt")  # type: ignore[misc]
        yield row("writing", f"5,000 classes, {split}", life)
    data = open_data(root)
    run = folder / "many_run"
    more = {"training__batch_size": 100, "validation__batch_size": 100, "training__epochs": 1}
    life = Life(training(data, run, **more), run.with_suffix(".txt"))
    yield row("training", "5,000 classes, half of them without validation", life)

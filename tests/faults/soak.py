"""Many epochs of a tiny data set: memory, file descriptors and threads must not grow."""

from contextlib import suppress
from pathlib import Path

from tests.conftest import SmallData
from tests.faults.lives import Life, Row, train

AFTER = 5  # epochs in which caches fill
GROWTH = 8.0  # MB of resident memory that may come and go after that


def sample(life: Life) -> tuple[float, int, int]:
    """Resident memory in MB, open descriptors, threads."""
    lines = Path(f"/proc/{life.pid}/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    descriptors = len(list(Path(f"/proc/{life.pid}/fd").iterdir()))
    return int(values["VmRSS"]) / 1000, descriptors, int(values["Threads"])


def soak(data: SmallData, folder: Path, epochs: int, table: Path | None) -> list[Row]:
    """One row an epoch, written beside `table`: memory when its line appears in the log, and the
    fewest descriptors and threads seen during it: those of the loader come and go."""
    run = folder / "soak"
    life = train(data.settings(run, training__epochs=epochs, training__ema_decay=0.9))
    taken: list[tuple[float, int, int]] = []
    seen: list[tuple[float, int, int]] = []

    def another() -> bool:
        with suppress(OSError, KeyError):  # it may have ended
            seen.append(sample(life))
        log = run / "log.jsonl"
        return log.exists() and log.read_text().count('"type": "epoch"') > len(taken)

    while len(taken) < epochs - 1 and life.until(another) and seen:  # after the last it ends
        memory, descriptors, threads = zip(*seen, strict=True)
        taken.append((memory[-1], min(descriptors), min(threads)))
        seen.clear()
    status = life.end()
    memory, descriptors, threads = zip(*taken[AFTER:], strict=True)
    growth = max(memory[len(memory) // 2 :]) - max(memory[: max(1, len(memory) // 2)])
    flat = max(descriptors) <= descriptors[0] + 1 and max(threads) <= threads[0] + 1
    well = status == 0 and flat and growth <= GROWTH
    what = (
        f"status {status}; after epoch {AFTER}: {min(memory):.0f} to {max(memory):.0f} MB (second half "
        f"{growth:+.1f}), {min(descriptors)} to {max(descriptors)} descriptors, "
        f"{min(threads)} to {max(threads)} threads"
    )
    if table is not None:
        lines = [f"{n} {m:.1f} {d} {t}\n" for n, (m, d, t) in enumerate(taken)]
        head = "epoch resident_MB descriptors threads\n"
        table.with_name("soak.txt").write_text(head + "".join(lines))
    return [Row("soak", f"{epochs} epochs", what, "nothing" if well else "?", well)]

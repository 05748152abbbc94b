"""kill -9 of the whole process group at random moments, until the run is through."""

import random
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from ffcv_imnet.core.log import read_log
from tests.conftest import SmallData
from tests.faults.lives import Row, changes_of, same_run, train
from tests.test_training import FULL

# A checkpoint after every step, so that most kills hit one while it is written.
KILLED = {**FULL, "training__checkpoint_minutes": 1e-9}


def more_than(count: Callable[[], int], wanted: int) -> Callable[[], bool]:
    """Whether `count` has passed `wanted` by now."""
    return lambda: count() > wanted


def kills(data: SmallData, folder: Path, whole: Path, count: int, seed: int) -> list[Row]:
    """`count` kills in one run, and the run compared with an undisturbed one: `whole`, if it is as long.

    Where a life is killed is drawn from its progress, so that a slow machine changes nothing: while
    it starts, or between one of its first checkpoints and the next.
    """
    draw = random.Random(seed)
    epochs = max(3, count // 2)  # three steps a life: the kills let two through, on average
    plan = {"training__epochs": epochs, "resolution__end_ramp": epochs - 1}
    settings = data.settings(folder / "killed", **{**KILLED, **plan})
    undisturbed = whole
    if epochs != len(read_log(whole).epochs):
        undisturbed = folder / "undisturbed"
        first = train(data.settings(undisturbed, **{**FULL, **plan}))
        if first.end() != 0:
            raise RuntimeError(f"the undisturbed run failed: {first.error()}")
    run = folder / "killed"
    starts, made, said = [1.0], 0, []
    for _ in range(count):
        checkpoints = changes_of(run / "last.pt")
        life = train(settings, "--resume", "auto")
        wanted = draw.randrange(3)
        if wanted:
            life.until(more_than(checkpoints, 0))
            starts.append(time.perf_counter() - life.started)
            before = time.perf_counter()
            life.until(more_than(checkpoints, wanted))
            step = (time.perf_counter() - before) / wanted  # seconds, with its checkpoint
            time.sleep(draw.uniform(0, step))
        else:
            time.sleep(draw.uniform(0, statistics.median(starts)))
        if not life.alive():
            break  # it ended by itself: the run is through, or it failed
        life.send(signal.SIGKILL)
        life.end()
        made += 1
        said.append(life.said())
        numbers = [e.epoch for e in read_log(run).epochs] if (run / "log.jsonl").exists() else []
        if numbers != list(range(len(numbers))):
            return [
                Row("kill", f"{made} times kill -9", f"the log has epochs {numbers}", "?", False)
            ]
    last = train(settings, "--resume", "auto")
    status = last.end()
    same = status == 0 and same_run(run, undisturbed)
    damaged = sum("is damaged" in words for words in said)
    happened = (
        f"then status {status}; {damaged} damaged checkpoints met; weights and log "
        + ("equal bit for bit" if same else "DIFFER")
        + ("" if made == count else f"; it was through before {count} kills")
    )
    injected = f"{made} times kill -9 in {epochs} epochs of {data.train_samples // 16} steps"
    well = same and made == count
    return [Row("kill", injected, happened, "nothing but the step in hand" if same else "?", well)]

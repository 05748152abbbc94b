"""RUN/heartbeat.json, by which an outside watcher knows that a run lives and where it is."""

import datetime
import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

from ffcv_imnet.core.atomic import NotWritten, atomic_write

EVERY = 5.0  # seconds between two writings, at least


class Heartbeat:
    """One JSON object, replaced in one step: `doing`, `epoch`, `step`, `time` (UTC), `pid`.

    The loops beat, not a thread beside them: a thread would go on beating while a loop hangs.
    Without a path nothing is written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.written = path, -math.inf
        self.epoch = self.step = 0

    def beat(
        self, doing: str, epoch: int | None = None, step: int | None = None, now: bool = False
    ) -> None:
        """Say that the run lives, still in the `epoch` and `step` it last named; `now`: at once.

        A file that cannot be written changes nothing: a full disk is the checkpoint's to report.
        """
        self.epoch = self.epoch if epoch is None else epoch
        self.step = self.step if step is None else step
        moment = time.monotonic()
        if self.path is None or (moment - self.written < EVERY and not now):
            return
        self.written = moment
        utc = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        said = {"doing": doing, "epoch": self.epoch, "step": self.step, "time": utc}
        said["pid"] = os.getpid()
        # Not forced to the disk: after a power cut no run lives, and an fsync every few seconds would
        # wait behind the checkpoint's.
        with suppress(NotWritten), atomic_write(self.path, "w", sync=False) as file:
            file.write(json.dumps(said) + "\n")


SILENT = Heartbeat()  # of measurements, and of processes other than the first

"""When a loop over batches looks up: a signal, a limit of hours or dollars, a due checkpoint, the clock."""

import math
import time

from ffcv_imnet.machine.distributed import StopSignal, World
from ffcv_imnet.train.heartbeat import SILENT, Heartbeat

LOOK_EVERY = 5.0  # seconds between the host's looks at the loss: each waits for the device
AGREE_EVERY = 8  # steps between votes of several processes: all must leave the loop at the same one


class Watch:
    """The reasons to look up from the steps: a signal, a limit, a due checkpoint, the host's clock.

    Several processes vote, every `AGREE_EVERY` steps: all must leave the loop at the same one.

    Args:
        heart: beats at every step.
        checkpoint_minutes: from the start of `train_epoch` to a checkpoint within the epoch; 0: none.
        listen: whether signals are noted.
    """

    def __init__(
        self, world: World, heart: Heartbeat = SILENT, checkpoint_minutes: float = 0.0,
        listen: bool = True,
    ) -> None:  # fmt: skip
        self.world, self.heart, self.stop = world, heart, StopSignal(listen)
        self.checkpoint_seconds = 60 * checkpoint_minutes or math.inf
        self.begin()

    def begin(self) -> None:
        """An epoch begins, or goes on after a checkpoint."""
        self.started = self.looked = time.perf_counter()
        self.stopped = self.late = self.due = False

    def _may_look(self, step: int, last: bool) -> bool:
        return self.world.size == 1 or last or step % AGREE_EVERY == 0

    def will_look(self, step: int, last: bool) -> bool:
        """Before a step: whether this process's clock will have the tally read after it."""
        late = time.perf_counter() - self.looked > LOOK_EVERY
        return self._may_look(step, last) and (last or late)

    def vote(self, step: int, last: bool) -> bool:
        """Whether there is a reason to read the tally, on all processes alike."""
        if not self._may_look(step, last):
            return False
        now = time.perf_counter()
        self.stopped, self.late, self.due, look = self.world.any(
            [
                self.stop.received is not None,
                self.stop.late,
                now - self.started > self.checkpoint_seconds,
                last or now - self.looked > LOOK_EVERY,
            ]
        )
        if look or self.leave:
            self.looked = now
        return look or self.leave

    @property
    def leave(self) -> bool:
        """Whether the loop ends after the step in hand, with a checkpoint."""
        return self.stopped or self.late or self.due

"""Progress of anything long: a tqdm bar on a terminal, a plain line now and then elsewhere."""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between plain lines; a log file of a day's run stays readable


def _is_terminal() -> bool:
    """Whether a bar can be drawn: a pseudo-terminal of no width (some CI, `script`) shows nothing of it."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class Progress:
    """Counts work done. Use as a context manager; `update` may be called for every item.

    Args:
        total: number of items, in `unit`.
        what: the word in front of the bar, for instance "epoch 3".
        unit: what is counted, for instance "img".
        enabled: False prints nothing (ranks other than 0).
        initial: items done before; they do not count in the rate.
    """

    def __init__(
        self, total: int, what: str, unit: str = "img", enabled: bool = True, initial: int = 0
    ) -> None:
        self.total, self.what, self.unit, self.enabled = total, what, unit, enabled
        self.done = self.initial = initial
        self.note = ""
        self.started = self.printed = time.monotonic()
        terminal = enabled and _is_terminal()
        self.bar = (
            tqdm(total=total, desc=what, unit=f" {unit}", leave=False, initial=initial)
            if terminal
            else None
        )

    def update(self, count: int, note: str = "") -> None:
        """`count` more items are done; `note` (loss, resolution) stands behind the bar until the next one."""
        self.done += count
        if note:
            self.note = note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif self.enabled and time.monotonic() - self.printed >= LINE_EVERY:
            self.printed = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The state as one plain line: percent, count, time so far and left, rate, note."""
        elapsed = time.monotonic() - self.started
        meter = tqdm.format_meter(
            self.done,
            self.total,
            elapsed,
            ncols=0,
            prefix=self.what,
            unit=f" {self.unit}",
            initial=self.initial,
        )
        return f"{meter} {self.note}".rstrip()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()

"""The signals that ask a command to end, Ctrl-C aside: they are heard alike everywhere."""

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

# SIGHUP: the terminal or the ssh session is lost. SIGUSR1: SLURM's warning before a job's time is over.
ENDING = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1

Handler = Callable[[int, FrameType | None], object]


def hear(handler: Handler) -> Callable[[], None]:
    """`handler` for each of them but those that are ignored, as `nohup` does with SIGHUP.

    Returns what puts the handlers of before back.
    """
    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}

    def restore() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    return restore


def exit_when_asked() -> Callable[[], None]:
    """End as Ctrl-C does, with `finally` and `with` run, and with status 128 + n. As `hear`."""

    def leave(number: int, _: FrameType | None) -> None:
        with suppress(OSError):  # the terminal may be what was lost
            print(f"ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    return hear(leave)


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Exit status of another process, which does not outlive this one: after `exit_when_asked` it is asked to end, too,
    and waited for."""
    with subprocess.Popen(command, env=env) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reached it too: it ends in its own, orderly way
            raise
        except SystemExit:  # a signal that reached only us
            process.terminate()
            process.wait()
            raise

"""The two ways a command ends badly, and how it says so.

`UsageError` is the user's to mend (command, setting, path) and exits with 2; `RunError` is work
that failed (unreadable images, a diverged loss, a dead worker) and exits with 1. Either is one
clear sentence that names the file or key; neither shows a traceback.
"""

import argparse
import difflib
import errno
import io
import itertools
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

REMEDIES = {  # by what the system says
    errno.ENOSPC: ": make room on its disk",
    errno.EDQUOT: ": make room, the quota is used up",
    errno.EROFS: ": name a place that can be written",
    errno.EACCES: ": is it yours to use?",
    errno.EPERM: ": is it yours to use?",
    errno.EFBIG: ": raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: ": raise the limit of open files (ulimit -n)",
    errno.EAGAIN: ": no more processes or threads can be started here (ulimit -u), take fewer workers",
    errno.ENOMEM: ": out of memory, take fewer workers",
}


OUT_OF_MEMORY = "error: out of memory: raise the limit (ulimit -v) or free some"


class UsageError(Exception):
    """The command, a setting or a path is wrong: nothing was started. Exit status 2."""

    status = 2


class RunError(Exception):
    """The command was right but the work failed. Exit status 1."""

    status = 1


class NonFiniteLoss(RunError):
    """The training loss became NaN or infinite, in `step` of `epoch`."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(
            f"the training loss became NaN or infinite in epoch {epoch}, step {step}: start again in "
            f"another logging.folder with a lower lr.lr or a longer lr.lr_peak_epoch, or go on with "
            f"--resume auto --training.on_nonfinite_loss=back, at a lower rate; what was saved before is kept"
        )
        self.epoch, self.step = epoch, step


class NonFiniteValidation(RunError):
    """The validation loss is NaN or infinite."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the {what} loss is NaN or infinite: the weights are lost; try a lower lr.lr"
        )


def nearest(word: str, candidates: Iterable[str]) -> str:
    """` (did you mean X?)` for the candidate closest to `word`, or an empty string if none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind `error`, also where another library has hidden it behind its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def not_written(path: object, error: BaseException) -> str:
    """`PATH could not be written (REASON): WHAT TO DO`, for whoever adds what is then lost or kept."""
    system = system_error(error)
    if system is None:
        return f"{path} could not be written ({reason_of(error)}): is its disk full?"
    if system.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{path} could not be written: its folder is a file, name another"
    remedies = {
        errno.ENOSPC: "make room",
        errno.EDQUOT: "make room",
        errno.EFBIG: "raise the limit (ulimit -f)",
        errno.EIO: "is its disk sound?",
    }
    remedy = remedies.get(system.errno or 0, "is its folder still there, and yours to write in?")
    return f"{path} could not be written ({system.strerror or system}): {remedy}"


def said_of(error: OSError) -> str:
    """One sentence for what the system refused and nobody has put in words nearer to it."""
    reason = error.strerror or str(error) or type(error).__name__
    what = f"{error.filename!s}: {reason}" if error.filename is not None else reason
    return what + REMEDIES.get(error.errno or 0, "")


def reason_of(error: BaseException) -> str:
    """The first line of another library's message, cut to what a line holds."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line that ends in `hint`, and whose options are never abbreviated."""

    def __init__(self, *, hint: str = "", **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=layout, **options)
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        raise UsageError(message + self.hint)

    def refuse_unknown(self, argv: Sequence[str]) -> None:
        """Raises UsageError with the nearest right name for an option that is none.

        To be called before parsing: argparse would rather complain of what is missing.
        """
        known = [option for action in self._actions for option in action.option_strings]
        words = [*itertools.takewhile(lambda word: word != "--", argv)]
        for word in words:
            if word.startswith("-") and not word.startswith("--") and os.path.lexists(word):
                raise UsageError(f"{word} would be taken for an option: write ./{word}")
        for given in (word.split("=")[0] for word in words if word.startswith("--")):
            if given not in known:
                raise UsageError(f"unknown option {given}{nearest(given, known)}{self.hint}")


def in_range(kind: type, low: float, high: float = float("inf")) -> Any:
    """An argparse type: a number of `kind` from `low` to `high`."""

    def convert(text: str) -> Any:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        span = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
        number = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {number} {span}")

    return convert


def begin_script(work: Callable[[], T]) -> T:
    """What a script does before its slow imports. Leaves the process as `run_main` does if it fails.

    From here until `run_main`, Ctrl-C ends the process and shows no traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    open_streams()
    sys.excepthook = _say_memory  # of the imports
    # Read when torch loads. Threads that spin while they wait make a run on a CPU crawl as soon as
    # anything else is busy; asleep they cost little.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _check_folder()
        return work()
    except (UsageError, RunError) as error:
        _end(error.status, f"error: {error}")


def _check_folder() -> None:
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        raise UsageError("the current folder is gone: cd to one that exists") from None


def _say_memory(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if _is_of_memory(error):
        print(OUT_OF_MEMORY, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _is_of_memory(error: BaseException) -> bool:
    """Whether memory ended, also where it did in loading a library."""
    return isinstance(error, MemoryError) or (
        isinstance(error, ImportError) and "failed to map" in str(error)
    )


def open_streams() -> None:
    """Give the standard streams that the caller closed (`>&-`) to /dev/null: the next file that is opened would
    take such a number, and what a library prints would go into a checkpoint."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:  # as Python has it then; `print` can do without, `flush` cannot
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def run_main(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process with its status, turning the two errors above into one line.

    Ctrl-C before the work has its own handler ends with 130, as a shell expects. Anything else is a
    bug of ours and keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # the scripts set it before their imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a class or file name that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_folder()
        status = main()
    except (UsageError, RunError) as error:
        _end(error.status, f"error: {error}")
    except ModuleNotFoundError as error:
        if (error.name or "ffcv_imnet").startswith("ffcv_imnet"):
            raise
        _end(
            1,
            f"error: this Python, {sys.executable}, has no module {error.name!r}; `source .venv/bin/activate` "
            "takes the one that `make setup` made",
        )
    except (MemoryError, ImportError) as error:
        if not _is_of_memory(error):
            raise
        _end(1, OUT_OF_MEMORY)
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except OSError as error:  # a full disk, a folder without permission
        if isinstance(error, BrokenPipeError) and _output_closed():
            sys.exit(128 + signal.SIGPIPE)  # without a word, as others end in `... | head`
        what = "the standard output: " if error.filename is None and _output_fails() else ""
        _end(1, f"error: {what}{said_of(error)}")
    sys.exit(status or 0)


def _end(status: int, said: str) -> NoReturn:
    with suppress(OSError):  # a full disk may hold the standard error, too
        print(said, file=sys.stderr, flush=True)
    sys.exit(status)


def _output_fails() -> bool:
    """Whether the standard output takes nothing, as on a full disk; what is left for it then goes nowhere."""
    try:
        os.write(1, b"\n")  # Python has forgotten what it could not write
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False


def _output_closed() -> bool:
    """Whether nobody reads the standard output; what is still buffered for it then goes nowhere."""
    try:
        sys.stdout.flush()
        # It may have had nothing to write.
        watched = select.poll()
        watched.register(1, 0)
        closed = any(event & select.POLLERR for _, event in watched.poll(0))
    except OSError:
        closed = True
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed

"""The two ways a command ends badly, and how it says so.

`UsageError` is the user's to mend (command, setting, path) and exits with 2; `RunError` is work
that failed (unreadable images, a diverged loss, a dead worker) and exits with 1. Either is one
clear sentence that names the file or key; neither shows a traceback.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UsageError(Exception):
    """The command, a setting or a path is wrong: nothing was started. Exit status 2."""

    status = 2


class RunError(Exception):
    """The command was right but the work failed. Exit status 1."""

    status = 1


def nearest(word: str, candidates: Iterable[str]) -> str:
    """` (did you mean X?)` for the candidate closest to `word`, or an empty string if none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def run_main(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process with its status, turning the two errors above into one line.

    Ctrl-C before the work has its own handler ends with 130, as a shell expects. Anything else is a
    bug of ours and keeps its traceback.
    """
    try:
        status = main()
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`
        print("error: the standard output was closed before the end", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: names its path itself
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(status or 0)

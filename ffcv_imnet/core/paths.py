"""Paths as people write them: `~` and environment variables, where no shell has replaced them; and
files that are none, such as pipes and devices."""

import argparse
import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ffcv_imnet.core.errors import UsageError


def expanded(text: str) -> str:
    """`~/x`, `$HOME/x` and `${HOME}/x` as a shell would; an address such as s3://... as it is.

    Raises:
        UsageError: there is no such variable or user, and no file of that very name.
    """
    if is_address(text) or ("$" in text and os.path.lexists(text)):
        return text
    path = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111 - Path would refuse ~nobody
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise UsageError(f"{text}: there is no environment variable {unset[1].strip('{}')}")
    if path.startswith("~"):
        raise UsageError(f"{text}: there is no user {path[1:].split('/')[0]}; a file is ./{path}")
    return path


def is_address(text: str) -> bool:
    """Whether it is of a store elsewhere: s3://BUCKET/NAME, https://..."""
    return "://" in text


def path_or_address(text: str) -> Path | str:
    """An argparse type."""
    return text if is_address(text) else path_of(text)


def path_of(text: str) -> Path:
    """An argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; the current folder is .")
    try:
        return Path(local(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local(text: str, what: str = "") -> str:
    """`expanded`, of what must be on this machine; `what` stands before it in the message.

    Raises:
        UsageError: as `expanded`, and for an address.
    """
    if is_address(text):
        raise UsageError(f"{what}{text} is an address: {HERE}")
    return expanded(text)


def open_regular(path: Path | str | bytes) -> BinaryIO:
    """A file open for reading, its size in `os.fstat`. A pipe would be waited for, a device read for ever.

    Raises:
        OSError: it cannot be opened, or is no regular file; `strerror` says which.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"it is {KINDS.get(stat.S_IFMT(mode), 'no regular file')}", path)
    return os.fdopen(descriptor, "rb")


def what_is(path: Path) -> str:
    """For the end of a sentence, where a file is wanted and `is_file` is false."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return f"it is {KINDS.get(stat.S_IFMT(mode), 'no regular file')}, and a file is wanted"


def check_output(option: str, out: Path | None, *suffixes: str) -> None:
    """Raises UsageError unless a file `out` can be written: its name ends in one of `suffixes`, and it is no
    manifest of a .beton."""
    if out is None:
        return
    if out.is_dir():
        raise UsageError(f"{option} {out} is a folder: name a file in it")
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {out}: its name must end in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        what = "is a file" if out.parent.is_file() else "does not exist"
        raise UsageError(f"{option} {out}: the folder {out.parent} {what}")
    if (beton := out.with_suffix(".beton")).exists() and out.suffix.lower() == ".json":
        raise UsageError(f"{option} {out} would replace the manifest of {beton}: name another")


def refuse_inputs(option: str, out: Path | None, *read: Path | str | None) -> None:
    """Raises UsageError if writing `out` would replace one of the files that the command reads."""
    for path in (Path(one) for one in read if one is not None):
        if out is not None and out.exists() and path.exists() and out.samefile(path):
            raise UsageError(f"{option} {out} would replace a file that is read: name another")


def refuse_inside(option: str, out: Path, folders: Iterable[Path]) -> None:
    """Raises UsageError if `out` is below one of `folders`, whose own folders are read as something."""
    for folder in folders:
        if Path(os.path.realpath(folder)) in Path(os.path.realpath(out)).parents:
            raise UsageError(
                f"{option} {out} is inside {folder}, whose folders are read as classes: name a folder outside it"
            )


HERE = "name a path on this machine"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

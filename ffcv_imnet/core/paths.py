"""Paths as people write them: `~` and environment variables, where no shell has replaced them."""

import argparse
import os
import re
from pathlib import Path

from ffcv_imnet.core.errors import UsageError


def expanded(text: str) -> str:
    """`~/x`, `$HOME/x` and `${HOME}/x` as a shell would; an address such as s3://... as it is.

    Raises:
        UsageError: there is no such variable or user, and no file of that very name.
    """
    if "://" in text or ("$" in text and os.path.lexists(text)):
        return text
    path = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111 - Path would refuse ~nobody
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise UsageError(f"{text}: there is no environment variable {unset[1].strip('{}')}")
    if path.startswith("~"):
        raise UsageError(f"{text}: there is no user {path[1:].split('/')[0]}; a file is ./{path}")
    return path


def path_of(text: str) -> Path:
    """An argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; the current folder is .")
    return Path(expanded(text))

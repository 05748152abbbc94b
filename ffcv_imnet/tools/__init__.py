"""`python -m ffcv_imnet <tool>`: each module here is a tool with `main(argv) -> int | None`.

The first line of its docstring is its line in `--help`. Nothing imports a tool.
"""

import argparse
from typing import NoReturn

from ffcv_imnet.errors import UsageError


class ToolParser(argparse.ArgumentParser):
    """argparse whose mistakes are one line and whose options are never abbreviated."""

    def __init__(self, tool: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m ffcv_imnet {tool}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help lists the options)")

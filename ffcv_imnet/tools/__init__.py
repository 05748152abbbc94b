"""`python -m ffcv_imnet <tool>`: each module here is a tool with `main(argv) -> int | None`.

The first line of its docstring is its line in `--help`. Nothing imports a tool.
"""

import logging
import os
import warnings
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from typing import Any

from ffcv_imnet.config.schema import DEVICES
from ffcv_imnet.core.errors import Parser

# Charts go to files, whatever the environment says; what matplotlib has to say of fonts is nothing that a user of
# ours could mend: another font is taken, and a box stands for a letter that none has.
os.environ["MPLBACKEND"] = "agg"
logging.getLogger("matplotlib").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", message="Glyph .* missing")


class ToolParser(Parser):
    """The command line of one tool."""

    def __init__(self, tool: str, description: str | None) -> None:
        prog = f"python -m ffcv_imnet {tool}"
        super().__init__(
            prog=prog, description=description, hint=f" ({prog} --help lists the options)"
        )

    def add_device(self) -> None:
        """`--device`, as train_imagenet.py takes it; for `describe_world`."""
        self.add_argument(
            "--device",
            choices=DEVICES,
            default="auto",
            help="auto: a GPU; the CPU where no NVIDIA card is",
        )

    def add_former(self, name: str, now: str, **options: Any) -> None:
        """An option's former name: taken as `now` is, and not listed."""
        self.add_argument(name, dest=now, default=SUPPRESS, help=SUPPRESS, **options)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Namespace:  # type: ignore[override]
        """Raises UsageError."""
        self.refuse_unknown(args)
        return super().parse_args(args, namespace)

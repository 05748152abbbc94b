"""`python -m ffcv_imnet <tool> [options]`: runs one of the tools in ffcv_imnet/tools."""

import ast
import importlib
import sys
from pathlib import Path

from ffcv_imnet.core.errors import UsageError, nearest, run_main

TOOLS = Path(__file__).parent / "tools"


def tools() -> dict[str, str]:
    """Every tool's name and the first line of its docstring, read without importing any."""
    return {
        path.stem: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split(
            "\n"
        )[0]
        for path in sorted(TOOLS.glob("*.py"))
        if path.stem != "__init__"
    }


def main() -> int | None:
    """The tool named first on the command line. Raises UsageError if there is none of that name."""
    name, *argv = sys.argv[1:] or ["--help"]
    known = tools()
    if name in ("-h", "--help", "help"):
        width = max(map(len, known))
        print("usage: python -m ffcv_imnet <tool> [options]\n\ntools (each has its own --help):")
        print("\n".join(f"  {tool:{width}}  {line}" for tool, line in known.items()))
        return 0
    if name not in known:
        raise UsageError(
            f"no tool is called {name!r}{nearest(name, known)}; python -m ffcv_imnet --help lists them"
        )
    status: int | None = importlib.import_module(f"ffcv_imnet.tools.{name}").main(argv)
    return status


if __name__ == "__main__":
    run_main(main)

"""`python -m ffcv_imnet <tool> [options]`, or `ffcv-imnet` once installed: a tool, or one of the scripts."""

import ast
import importlib
import sys
from pathlib import Path

from ffcv_imnet.core.errors import UsageError, nearest, run_main

HERE = Path(__file__).parent
SCRIPTS = {"write": "write_ffcv", "train": "train_imagenet"}  # beside the package


def tools() -> dict[str, str]:
    """Every tool's name and the first line of its docstring, read without importing any."""
    paths = {name: HERE.parent / f"{script}.py" for name, script in SCRIPTS.items()}
    paths |= {path.stem: path for path in sorted((HERE / "tools").glob("*.py"))}
    del paths["__init__"]
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    return {name: (ast.get_docstring(tree) or "").split("\n")[0] for name, tree in trees.items()}


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
    status: int | None
    if name in SCRIPTS:
        sys.argv = [SCRIPTS[name], *argv]  # as if the script had been started
        status = importlib.import_module(SCRIPTS[name]).main()
    else:
        status = importlib.import_module(f"ffcv_imnet.tools.{name}").main(argv)
    return status


def command() -> None:
    """What `ffcv-imnet` starts."""
    run_main(main)


if __name__ == "__main__":
    command()

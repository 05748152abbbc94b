"""Whether this Python has what the acceptance needs: all that is missing in one sentence, before anything is run.

    python -m acceptance.packages

Loads the two that need system libraries, and only looks for the others.
"""

import importlib
import importlib.util
import sys

from ffcv_imnet.core.errors import UsageError, run_main

# Module, and what pip calls it where that is another name.
NEEDED = {
    "torch": "",
    "torchvision": "",
    "numpy": "",
    "numba": "",
    "PIL": "pillow",
    "yaml": "PyYAML",
    "tqdm": "",
    "tabulate": "",
    "matplotlib": "",
    "scipy": "",
    "pytest": "",
    "fastargs": "",
}
LOADED = {"cv2": "opencv-python-headless", "ffcv": ""}


def missing() -> list[str]:
    """A package each, with the reason where it is there and does not load."""
    found = [pip or name for name, pip in NEEDED.items() if importlib.util.find_spec(name) is None]
    for name, pip in LOADED.items() if not found else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            found.append(f"{pip or name} ({error})")
    return found


def main() -> int:
    """Exit status 0 if nothing is missing. Raises UsageError."""
    if lacking := missing():
        raise UsageError(
            f"{sys.executable} lacks {', '.join(lacking)}: name a Python that has them with PYTHON=..., or make the "
            f"bundle with `--with` these (not torch, torchvision)"
        )
    return 0


if __name__ == "__main__":
    run_main(main)

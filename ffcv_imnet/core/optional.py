"""Packages that only some commands need: asked for in one place, and missed in one sentence."""

import importlib
import importlib.util
from typing import Any

from ffcv_imnet.core.errors import UsageError, reason_of

EXPORT = "onnx onnxruntime safetensors"  # the group `export` of pyproject.toml


def is_there(module: str) -> bool:
    """Whether `module` is installed.

    Its own file counts: `nvidia`, of DALI, is a folder of CUDA's wheels too, and a folder `wandb` of
    somebody's runs can be imported as an empty package.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package above it
        return False
    return found is not None and found.origin is not None


def require(module: str, what: str, install: str) -> Any:
    """The module, imported.

    Args:
        what: needs it, in the message.
        install: names for pip.

    Raises:
        UsageError: it is not installed, or does not load.
    """
    if not is_there(module):
        raise UsageError(f"{what} needs {module}, which is not installed: pip install {install}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{what} needs {module}, which is installed and does not load ({reason_of(error)}): "
            f"pip install --force-reinstall {install}"
        ) from error

"""Stand-ins for objects of other libraries in checkpoints: they are read without importing or running those."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint

# Libraries whose objects stand beside the weights in checkpoints of public training scripts: arguments
# (torchvision, timm), hyperparameters (Lightning, omegaconf), states of generators (NumPy), metrics.
BESIDE_WEIGHTS = (
    "argparse", "collections", "datetime", "enum", "lightning", "lightning_fabric", "ml_collections", "numpy",
    "omegaconf", "pathlib", "pytorch_lightning", "torchmetrics", "typing", "yacs",
)  # fmt: skip
PLAIN_TYPES = {
    f"builtins.{name}"
    for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")
}


OLD_COMMON = (
    "argparse.Namespace", "collections.defaultdict", "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy.dtype", "numpy.ndarray", "pathlib.PosixPath",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",  # NumPy 2
    "pathlib._local.PosixPath",  # Python 3.13
)  # fmt: skip


class Inert:
    """Stands for an object of another library's class: takes what the pickle gives it, and keeps nothing."""

    def __new__(cls, *_: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class InertDict(Inert):
    """Likewise; it may be a dict's heir, which torch fills only where it is one of three types."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def stand_ins(
    path: Path, zipped: bool
) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """A stand-in for each name beside the weights that torch would refuse, with that name.

    A pickle from before torch 1.6 cannot be asked: there the commonest are tried.
    """
    names = get_unsafe_globals_in_checkpoint(path) if zipped else OLD_COMMON
    known = (n for n in names if n in PLAIN_TYPES or n.split(".", 1)[0] in BESIDE_WEIGHTS)
    # NumPy's have states that are no dicts.
    return [(type(n, (Inert if n.startswith("numpy.") else InertDict,), {}), n) for n in known]

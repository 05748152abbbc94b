"""Networks by name: a dict and a decorator."""

from collections.abc import Callable

from torch import nn

from ffcv_imnet.errors import UsageError, nearest

Constructor = Callable[[int, bool], nn.Module]  # (classes, zero_gamma) -> network
REGISTRY: dict[str, Constructor] = {}


def register(constructor: Constructor) -> Constructor:
    """Add a network under its function's name. It takes normalised pixels (N, 3, H, W)."""
    REGISTRY[constructor.__name__] = constructor
    return constructor


def check_arch(name: str) -> None:
    """Raises UsageError, with the nearest right name, if no network is called `name`."""
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise UsageError(f"model.arch {name!r} is not one of {known}{nearest(name, REGISTRY)}")


def build(name: str, classes: int, zero_gamma: bool) -> nn.Module:
    """A network with fresh weights from torch's generator. Raises UsageError; see `check_arch`."""
    check_arch(name)
    return REGISTRY[name](classes, zero_gamma)

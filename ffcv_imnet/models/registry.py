"""Networks by name: a dict and a decorator, and timm's under `timm:NAME`."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ffcv_imnet.core.errors import UsageError, nearest, reason_of
from ffcv_imnet.core.optional import require

Constructor = Callable[[int, bool], nn.Module]  # (classes, zero_gamma) -> network
REGISTRY: dict[str, Constructor] = {}
TIMM = "timm:"  # the prefix of its names, of which many are those of other networks here


def register(constructor: Constructor) -> Constructor:
    """Add a network under its function's name. It takes normalised pixels (N, 3, H, W).

    Raises UsageError if another one has that name.
    """
    name = constructor.__name__
    if name in REGISTRY and source(REGISTRY[name]) != source(constructor):
        raise UsageError(
            f"two networks are called {name}: in {source(REGISTRY[name])} and in {source(constructor)}; "
            f"rename one"
        )
    REGISTRY[name] = constructor
    return constructor


def source(constructor: Constructor) -> str:
    """The file that a network is defined in."""
    return inspect.getsourcefile(constructor) or constructor.__module__


def check_arch(name: str) -> None:
    """Raises UsageError, with the nearest right name, if no network is called `name`."""
    if name.startswith(TIMM):
        _timm(name)
    elif name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise UsageError(
            f"model.arch {name!r} is not one of {known}, {TIMM}NAME{nearest(name, REGISTRY)}; a file of "
            f"your own is named in the imports of ffcv_imnet/models/__init__.py"
        )


def _timm(name: str) -> Any:
    """The timm package, which has the network `timm:NAME`. Raises UsageError."""
    timm = require("timm", repr(name), "timm")
    if not timm.is_model(name.removeprefix(TIMM)):
        known = [TIMM + other for other in timm.list_models()]
        raise UsageError(f"timm {timm.__version__} has no {name!r}{nearest(name, known)}")
    return timm


def build(name: str, classes: int, zero_gamma: bool) -> nn.Module:
    """A network with fresh weights from torch's generator. Raises UsageError; see `check_arch`.

    timm's start as timm starts them (its ResNets with the last BatchNorms at zero).
    """
    if name.startswith(TIMM):
        if zero_gamma:
            raise UsageError(f"model.zero_gamma is not for {name!r}, which starts as timm does it")
        return _timm(name).create_model(name.removeprefix(TIMM), num_classes=classes)
    check_arch(name)
    try:
        network = REGISTRY[name](classes, zero_gamma)
    except Exception as error:
        raise UsageError(
            f"model.arch {name!r} ({source(REGISTRY[name])}): its constructor, called with (classes, "
            f"zero_gamma), raises {type(error).__name__}: {reason_of(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model.arch {name!r} ({source(REGISTRY[name])}): its constructor returns "
            f"{type(network).__name__}, not a network; has it a return?"
        )
    return network

"""From images to a trained ImageNet classifier: FFCV files, FFCV loaders, short recipes.

For training loops of one's own (docs/loader.md), imported when first asked for:

    ImageLoader     an iterable of batches from a .beton
    CropDecoder     the fast decoder, for a pipeline of `ffcv.Loader`
    UsageError      what either raises for a wrong argument or file
    RunError        and for damaged data
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffcv_imnet.core.errors import RunError, UsageError
    from ffcv_imnet.data.decoders import CropDecoder
    from ffcv_imnet.data.image_loader import ImageLoader

__all__ = ["CropDecoder", "ImageLoader", "RunError", "UsageError"]
_MODULES = {"CropDecoder": "data.decoders", "ImageLoader": "data.image_loader"}


def __getattr__(name: str) -> Any:
    """A name of `__all__`; Python asks here for what is not there yet."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'core.errors')}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    """With the names that were not asked for yet."""
    return sorted({*globals(), *__all__})

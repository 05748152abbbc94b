"""numba's njit as the loader uses it: without Python's lock, compiled once on a machine."""

from collections.abc import Callable
from typing import Any

from numba import njit


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """The code is kept beside the source, in the user's cache folder or in NUMBA_CACHE_DIR; where none of them can
    be written (a read-only tree, a user without a home) each process compiles anew."""

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return njit(nogil=True, **options)(function)

    return compiled

"""Import before ffcv: a process then starts three seconds sooner.

`ffcv.fields.rgb_image` keeps the numbers of its two storage modes in numba's typed Dict, for which
numba compiles a dozen functions at every import; compiled code never touches it. While ffcv is
imported, a plain dict takes its place.
"""

import numba.typed

_kept = numba.typed.Dict
numba.typed.Dict = dict
try:
    import ffcv  # noqa: F401
finally:
    numba.typed.Dict = _kept

"""Import before ffcv: a process then starts three seconds sooner.

`ffcv.fields.rgb_image` keeps the numbers of its two storage modes in numba's typed Dict, for which
numba compiles a dozen functions at every import; compiled code never touches it. While ffcv is
imported, a plain dict takes its place. And torch keeps its threads, of which ffcv would leave it one.

And the process ends: where TBB is installed (Debian's OpenCV brings it) numba's threads are TBB's, and on
one core a process that has forked would wait for them for ever when its module is unloaded. So it never is.
"""

import ctypes
from contextlib import suppress

import numba.typed
import torch

_kept, _threads = numba.typed.Dict, torch.get_num_threads()
numba.typed.Dict = dict
try:
    import ffcv  # noqa: F401
finally:
    numba.typed.Dict = _kept
    torch.set_num_threads(_threads)

with suppress(ImportError):  # there is no TBB
    from numba.np.ufunc import tbbpool  # type: ignore[attr-defined]

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(tbbpool))

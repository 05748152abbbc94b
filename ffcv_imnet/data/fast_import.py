"""Import before ffcv: a process then starts three seconds sooner.

`ffcv.fields.rgb_image` keeps the numbers of its two storage modes in numba's typed Dict, for which
numba compiles a dozen functions at every import; compiled code never touches it. While ffcv is
imported, a plain dict takes its place. And torch keeps its threads, of which ffcv would leave it one.
"""

import numba.typed
import torch

_kept, _threads = numba.typed.Dict, torch.get_num_threads()
numba.typed.Dict = dict
try:
    import ffcv  # noqa: F401
finally:
    numba.typed.Dict = _kept
    torch.set_num_threads(_threads)

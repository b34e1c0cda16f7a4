"""numba's loops on torch's threads: one pool, bound to the cores that vLLM has chosen.

Importing this module, before anything is compiled, makes numba find torch's OpenMP library.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numba
import torch


def _share_torch_openmp() -> None:
    """Let numba's loops run on torch's OpenMP threads.

    numba asks for the system's libgomp and torch brings its own. Two pools on the same cores wait for each
    other's spinning threads, tens of milliseconds a call; with torch's symbols global, numba finds those.
    """
    packages = Path(torch.__file__).parent
    for folder in (packages / "lib", packages.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_share_torch_openmp()
# OpenMP's layer is not to be had where the system has no libgomp of its own.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "workqueue", "tbb"]


@cache
def _start_threads() -> None:
    """Start numba's threads, and undo what this does to torch's, which are the same.

    It allows nested OpenMP regions, with which torch's bfloat16 attention takes five times as long, and lets
    torch use every core, whatever OMP_NUM_THREADS says.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    for name, value in (("omp_set_max_active_levels", 1), ("omp_set_num_threads", threads)):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(value)


def use_torch_threads() -> int:
    """Give numba's loops as many threads as torch has; how many."""
    _start_threads()
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return threads

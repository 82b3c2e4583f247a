"""NumPy views of memory that a kernel receives as a bare address.

Some of vLLM's kernels take an array of pointers, one a KV-cache group. A fall-back
reads and writes the same memory through a view made of the address.
"""

import ctypes
from functools import lru_cache

import numpy as np

# A view cannot be longer than this many elements; it only has to exceed every
# block table (requests x blocks), since indexing never goes beyond the real one.
_VIEW_ELEMENTS = 1 << 40


@lru_cache(maxsize=1024)
def int32_memory(address: int) -> np.ndarray:
    """View the int32 values that start at ``address``.

    The view knows no bounds, like the pointer it stands for, and keeps nothing
    alive. A cached view stays right when the memory is reused, because it depends
    on nothing but the address.

    Parameters
    ----------
    address : int
        Value of ``tensor.data_ptr()`` of a live int32 tensor on the CPU.

    Returns
    -------
    numpy.ndarray
        Flat int32 view; ``view[row * stride + column]`` is an element of the table.
    """
    memory = (ctypes.c_int32 * _VIEW_ELEMENTS).from_address(address)
    return np.frombuffer(memory, dtype=np.int32)

"""Handing memory back that is only kept in case somebody asks for it again."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

_PAGEOUT = 21  # linux/mman.h, since 5.4
_LEAST_BYTES = 1 << 20  # below this the call costs more than it gives


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


def release_pages(address: int, size_bytes: int) -> bool:
    """Ask the kernel to take the whole pages inside [address, address + size_bytes) out of memory; False where it cannot.

    Nothing is lost: pages of a mapped file are read from it again when touched, others stay or go to swap.
    """
    madvise = _madvise()
    if madvise is None or size_bytes < _LEAST_BYTES:
        return False
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return madvise(first, last - first, _PAGEOUT) == 0

"""Memory between this process and the kernel: what to hand back, what to keep."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any

_PAGEOUT = 21  # linux/mman.h, since 5.4
_LEAST_BYTES = 1 << 20  # below this the call costs more than it gives
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES, _HEAP_BYTES = 256 << 20, 32 << 20  # the second is the most that glibc takes
_SETTLED = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


def release_pages(address: int, size_bytes: int) -> bool:
    """Ask the kernel to take the whole pages inside [address, address + size_bytes) out of memory; False where it
    cannot.

    Nothing is lost: pages of a mapped file are read from it again when touched, others stay or go to swap.
    """
    madvise = _madvise()
    if madvise is None or size_bytes < _LEAST_BYTES:
        return False
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return madvise(first, last - first, _PAGEOUT) == 0


@cache
def keep_freed_memory() -> bool:
    """Have malloc keep up to 256 MiB of what is freed, for the whole process; False where the environment has settled
    it, or without glibc.

    Layer after layer frees and asks for the same megabytes. Given back in between, they return as pages that the kernel
    clears and maps one by one.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTLED):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return (
        mallopt is not None
        and mallopt(_MMAP_THRESHOLD, _HEAP_BYTES) == 1
        and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES) == 1
    )


def return_freed_memory() -> bool:
    """Give freed memory back to the kernel, `keep_freed_memory` notwithstanding; False without glibc. Milliseconds.

    For after something large: what is freed between objects that stay is never reused as a whole, and the process would
    grow with every coincidence.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    return trim is not None and trim(0) == 1

"""What malloc does with freed memory, in processes of their own: the setting is for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc is asked on Linux only")
# faults of clearing 24 MiB, freed and asked for again
_PROGRAM = """
import ctypes, resource
from quota.core.malloc import keep_freed_memory
kept = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(24 << 20)
    libc.memset(block, 1, 24 << 20)
    libc.free(block)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment: str) -> list[int]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_is_there_again_without_faults() -> None:
    kept, faults = run()
    assert kept == 1 and faults < 100


def test_the_environment_decides_where_it_says_something() -> None:
    kept, faults = run(MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="33554432")
    assert kept == 0 and faults > 1000

"""This machine's ceilings, measured: multiply-add rate per unit, and read bandwidth per size of what is read.

Time of a call is bounded below by max(operations / rate of its unit, bytes that must move / bandwidth at its working
set).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from quota.core.errors import BuildError

_SOURCE = Path(__file__).with_name("probe.cpp")
_UNITS = {
    "vpdpbusd": "avx512_vnni",
    "vpmaddubsw": "avx2",
    "fma512": "avx512f",
    "fma256": "fma",
    "vdpbf16ps": "avx512_bf16",
    "tdpbusd": "amx_int8",
    "tdpbf16ps": "amx_bf16",
}
_SIZES = (1 << 20, 16 << 20, 64 << 20, 1 << 30)  # second-level cache, last-level cache twice, memory
_ROUNDS, _ROUND_S = 5, 0.02


@dataclass(frozen=True)
class Ceilings:
    """operations: unit -> operations per second (a multiply-add counts two); bandwidth: working-set bytes -> bytes per
    second."""

    threads: int
    operations: dict[str, float] = field(default_factory=dict)
    bandwidth: dict[int, float] = field(default_factory=dict)

    def floor_ms(self, unit: str, operations: float, moved: float, *, cold: bool) -> tuple[float, str] | None:
        """(least milliseconds, "compute" or "bandwidth"); None where the unit was not measured."""
        rate = self.operations.get(unit)
        if rate is None or not self.bandwidth:
            return None
        sizes = sorted(self.bandwidth)
        size = sizes[-1] if cold else next((s for s in sizes if moved <= s), sizes[-1])
        compute, bandwidth = 1e3 * operations / rate, 1e3 * moved / self.bandwidth[size]
        return (compute, "compute") if compute >= bandwidth else (bandwidth, "bandwidth")


@cache
def probe() -> ctypes.CDLL:
    """The compiled probe. BuildError without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise BuildError("the ceilings need a C++ compiler (c++ or $CXX); install one")
    stamp = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"quota-probe-{os.getuid()}-{stamp}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        command = [
            compiler,
            "-O2",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            str(_SOURCE),
            "-o",
            str(fresh),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"the ceiling probe does not compile: {done.stderr.strip().splitlines()[-1]}")
        fresh.replace(library)
    loaded = ctypes.CDLL(str(library))
    for unit in _UNITS:
        function = getattr(loaded, f"operations_{unit}")
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
    loaded.stream_read.restype, loaded.stream_read.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_int64]
    return loaded


@cache
def _memory() -> Tensor:
    return torch.zeros(_SIZES[-1], dtype=torch.uint8)


def evict_caches() -> None:
    """Read 1 GiB, so that nothing that was used before is still in a cache."""
    probe().stream_read(_memory().data_ptr(), _SIZES[-1])


@cache
def measure(threads: int) -> Ceilings:
    """Ceilings of `threads` threads together: one thread by CPU time (valid on a busy machine), more by wall time."""
    loaded, has = probe(), set(machine.cpu()["features"])
    operations = {}
    for unit, feature in _UNITS.items():
        if feature in has and (rate := _rate(getattr(loaded, f"operations_{unit}"), threads)):
            operations[unit] = rate
    memory = _memory()
    memory.fill_(1)  # zeros that were never written share one page
    bandwidth = {size: _rate(partial(_read, loaded, memory, size), threads) for size in _SIZES}
    return Ceilings(threads, operations, bandwidth)


def _read(loaded: ctypes.CDLL, memory: Tensor, size: int, passes: int) -> float:
    return sum(loaded.stream_read(memory.data_ptr(), size) for _ in range(passes))


def _rate(work: Callable[[int], float], threads: int) -> float:
    """Operations per second of `work(passes)` on `threads` threads: the best round, for it is a ceiling."""
    passes = 1
    while (seconds := _seconds(work, passes, 1)[0]) < _ROUND_S:
        if not _seconds(work, passes, 1)[1]:
            return 0.0
        passes = passes * 2 if seconds < _ROUND_S / 8 else int(passes * _ROUND_S / seconds) + 1
    return max(done / seconds for seconds, done in (_seconds(work, passes, threads) for _ in range(_ROUNDS)))


def _seconds(work: Callable[[int], float], passes: int, threads: int) -> tuple[float, float]:
    if threads == 1:
        began = time.thread_time()
        done = work(passes)
        return time.thread_time() - began, done
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [1] * threads))
        began = time.perf_counter()
        done = sum(pool.map(work, [passes] * threads))
        return time.perf_counter() - began, done

"""Where and on what a row was measured: processor, versions, commit, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from quota.core.files import sha256_file

ROOT = Path(__file__).resolve().parents[2]
_FEATURES = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
_PACKAGES = ("torch", "transformers", "openvino", "onnxruntime", "llama-cpp-python")
_IDLE_LOAD = 0.5  # one-minute load average, this process not counted, above which wall time is not to be trusted


@cache
def cpu() -> dict[str, Any]:
    """{"cpu": name, "features": those that kernels care about, "cores": usable by this process}"""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "features": [f for f in _FEATURES if f in flags], "cores": cores}


@cache
def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def source() -> dict[str, Any]:
    """{"commit", "dirty", "library": first 12 hex digits of the native library's SHA-256}; commit is the version where there is no git tree."""
    from quota import __version__

    library = ROOT / "quota" / "_native" / "libquota_cpu.so"
    commit = _git("rev-parse", "--short=12", "HEAD")
    # results are not part of what is measured: writing them must not make the next row "dirty"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "quota", "csrc", "setup.py")
    return {"commit": commit or f"v{__version__}", "dirty": bool(changed), "library": sha256_file(library)[:12] if library.exists() else None}


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def load() -> float:
    """One-minute load average."""
    return round(os.getloadavg()[0], 2)


def others_running(own_threads: int) -> float:
    """Runnable work beside our own threads, from the load average; 0 on an idle machine."""
    return max(0.0, load() - own_threads)


def idle() -> bool:
    """Whether wall times can be trusted: to be asked before the work starts."""
    return load() < _IDLE_LOAD


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

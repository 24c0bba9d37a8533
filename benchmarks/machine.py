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
from quota.eval import machine as evaluated

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "transformers", "openvino", "onnxruntime", "llama-cpp-python")
_IDLE_LOAD = 0.5  # one-minute load average, this process not counted, above which wall time is not to be trusted


@cache
def cpu() -> dict[str, Any]:
    """{"cpu": name, "features": those that kernels care about, "cores": usable by this process}"""
    found = evaluated.cpu()
    return {"cpu": found["name"], "features": found["features"], "cores": found["cores"]}


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
    """{"commit", "dirty", "library": first 12 hex digits of the native library's SHA-256}; commit is the version where
    there is no git tree."""
    from quota.core.version import VERSION

    library = ROOT / "quota" / "_native" / "libquota_cpu.so"
    commit = _git("rev-parse", "--short=12", "HEAD")
    # results are not part of what is measured: writing them must not make the next row "dirty"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "quota", "csrc", "setup.py")
    return {
        "commit": commit or f"v{VERSION}",
        "dirty": bool(changed),
        "library": sha256_file(library)[:12] if library.exists() else None,
    }


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def load() -> float:
    """One-minute load average."""
    return round(os.getloadavg()[0], 2)


def idle() -> bool:
    """Whether wall times can be trusted: to be asked before the work starts."""
    return load() < _IDLE_LOAD


def free_bytes() -> int:
    """Memory that a new process can take without pushing others out."""
    return _kilobytes("/proc/meminfo")["MemAvailable"]


def memory() -> dict[str, int]:
    """This process: its largest resident set so far, the one now, and of that what is not a mapped file (those can be
    dropped and read again)."""
    now = _kilobytes("/proc/self/status")
    return {"peak_rss_bytes": now["VmHWM"], "rss_bytes": now["VmRSS"], "anonymous_bytes": now["RssAnon"]}


def _kilobytes(path: str) -> dict[str, int]:
    """The "name: number kB" lines of a file in /proc, in bytes."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {parts[0].rstrip(":"): 1024 * int(parts[1]) for parts in lines if len(parts) == 3 and parts[2] == "kB"}

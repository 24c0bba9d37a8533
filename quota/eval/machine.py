"""What this machine is and which op implementations it runs: for `quota doctor` and reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from quota.core.errors import QuotaError

_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


def cpu() -> dict[str, Any]:
    """{"name", "cores" usable by this process, "features" that kernels care about}"""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
            break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": name, "cores": usable, "features": [f for f in _FEATURES if f in flags]}


def op_rows() -> tuple[list[dict[str, Any]], list[str]]:
    """(one row per op and implementation: op, implementation, state; problems). A wrong QUOTA_IMPL is a problem, not a crash."""
    import quota.ops  # noqa: F401  (registers the ops)
    from quota.core.registry import ops

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for name, op in ops().items():
        try:
            chosen: str | None = op.choose().name
        except QuotaError as error:
            chosen = None
            if str(error) not in problems:
                problems.append(str(error))
        for implementation in op.implementations:
            state = "chosen" if implementation.name == chosen else "available"
            try:
                reason = implementation.why_not()
            except QuotaError as error:  # QUOTA_CPU_ISA asks for what this CPU lacks
                reason = str(error)
                if reason not in problems:
                    problems.append(reason)
            rows.append({"op": name, "implementation": implementation.name, "state": f"not here: {reason}" if reason else state})
    return rows, problems


def describe_native() -> str:
    """One line: the native library and its instruction set, or why it is not used."""
    from quota.ops import native

    return native.describe()

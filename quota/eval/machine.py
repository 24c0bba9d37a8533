"""What this machine is and which op implementations it runs: for `quota doctor` and reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quota.core.errors import QuotaError

if TYPE_CHECKING:
    from quota.core.registry import Context

_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512vbmi",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
)


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
    """(one row per op and implementation: op, implementation, state on the CPU and, where there is a CUDA device,
    on_cuda; problems).

    A wrong QUOTA_IMPL is a problem, not a crash.
    """
    import quota.ops  # noqa: F401  (registers the ops)
    from quota.core.registry import HOST, Context, ops

    problems: list[str] = []
    columns = {"state": _states(HOST, problems)}
    if cuda_devices():
        columns["on_cuda"] = _states(Context("cuda"), problems)
    pairs = [(name, implementation.name) for name, op in ops().items() for implementation in op.implementations]
    return [
        {"op": op, "implementation": name, **{k: states[op, name] for k, states in columns.items()}}
        for op, name in pairs
    ], problems


def _states(ctx: Context, problems: list[str]) -> dict[tuple[str, str], str]:
    """(op, implementation) -> chosen, available, or why it cannot run in `ctx`."""
    from quota.core.registry import ops

    states: dict[tuple[str, str], str] = {}
    for name, op in ops().items():
        try:
            chosen: str | None = op.choose(ctx).name
        except QuotaError as error:
            chosen = None  # on a GPU that nothing runs on, the rows say why, and the CPU still works
            if not str(error).startswith("device:") and str(error) not in problems:
                problems.append(str(error))
        for implementation in op.implementations:
            state = "chosen" if implementation.name == chosen else "available"
            try:
                reason = implementation.supports(ctx)
            except QuotaError as error:  # QUOTA_CPU_ISA asks for what this CPU lacks
                reason = str(error)
                if reason not in problems:
                    problems.append(reason)
            states[name, implementation.name] = f"not here: {reason}" if reason else state
    return states


def cuda_devices() -> list[dict[str, Any]]:
    """{"name", "capability" as 9.0, "memory_bytes"} of each CUDA device that torch sees."""
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in found]


def describe_float_attention() -> str:
    """One line: what computes attention in the parts that stay float, and why."""
    import torch

    from quota.nn.float_attention import why_not_flash

    reason = why_not_flash(torch.device("cuda" if cuda_devices() else "cpu"), torch.float16)
    return (
        f"torch scaled_dot_product_attention ({reason})"
        if reason
        else "flash-attn on CUDA in float16 and bfloat16, else torch scaled_dot_product_attention"
    )


def describe_native() -> str:
    """One line: the native library and its instruction set, or why it is not used."""
    from quota.ops import native

    return native.describe()

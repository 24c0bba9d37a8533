"""Environment variables, parsed in one place. A typo is an error, never a silent default."""

from __future__ import annotations

import os

from quota.core.errors import UsageError

CPU_ISAS = ("amx", "avx512vnni", "avxvnni", "avx2", "portable")


def forced_implementations() -> dict[str, str]:
    """`QUOTA_IMPL="op=impl,op=impl"` -> {op: impl}."""
    forced: dict[str, str] = {}
    for item in filter(None, os.environ.get("QUOTA_IMPL", "").split(",")):
        op, sep, impl = item.partition("=")
        if not (sep and op.strip() and impl.strip()):
            raise UsageError(f'QUOTA_IMPL: expected "op=implementation[,op=implementation]", got {item!r}')
        forced[op.strip()] = impl.strip()
    return forced


def forced_cpu_isa() -> str | None:
    """`QUOTA_CPU_ISA` -> one of `CPU_ISAS`, or None for the best this CPU has."""
    isa = os.environ.get("QUOTA_CPU_ISA", "")
    if isa and isa not in CPU_ISAS:
        raise UsageError(f"QUOTA_CPU_ISA: expected one of {', '.join(CPU_ISAS)}, got {isa!r}")
    return isa or None


def triton_interpreted() -> bool:
    """`TRITON_INTERPRET=1`: Triton kernels run in its interpreter, on CPU tensors. Triton reads it when a kernel is
    defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""Launching: sizes from a table per architecture, never from timing at the first call; no product is fused with a sum
behind the kernel's back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ARCHITECTURES = (80, 86, 89, 90)

# op -> architecture -> sizes; an architecture that is not listed takes those of the newest one below it. Not tuned:
# chosen from shared memory (99 KiB per block on 8.6 and 8.9, 163 on 8.0, 227 on 9.0) and registers, which `python -m
# quota_kernels.inspect` prints.
_TABLE: dict[str, dict[int, dict[str, int]]] = {
    "w4a4_linear.many": {
        0: {"rows": 64, "columns": 64, "bytes": 64, "num_warps": 4, "num_stages": 1},
        80: {"rows": 128, "columns": 128, "bytes": 64, "num_warps": 8, "num_stages": 4},
        86: {"rows": 128, "columns": 128, "bytes": 64, "num_warps": 8, "num_stages": 3},
        90: {"rows": 128, "columns": 128, "bytes": 64, "num_warps": 8, "num_stages": 4},
    },
    "w4a4_linear.few": {
        0: {"rows": 16, "columns": 64, "bytes": 64, "num_warps": 4, "num_stages": 1},
        80: {"rows": 16, "columns": 32, "bytes": 128, "num_warps": 4, "num_stages": 4},
        90: {"rows": 16, "columns": 32, "bytes": 256, "num_warps": 4, "num_stages": 4},
    },
    "w4a16_linear.many": {0: {"most_rows": 16, "per_thread": 16}, 80: {"most_rows": 64, "per_thread": 16}},
    "w4a16_linear.few": {0: {"most_rows": 16, "per_thread": 4}, 80: {"most_rows": 16, "per_thread": 4}},
    "kv4_attention": {
        0: {"most_rows": 64, "num_warps": 4},
        80: {"most_rows": 32, "num_warps": 8},  # 64 rows spill 6 KB per thread on 9.0
    },
}


@dataclass(frozen=True)
class Call:
    """One launch that was recorded instead of made."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Call] | None = None
_recorded_arch = ARCHITECTURES[-1]


@contextmanager
def recording(arch: int) -> Iterator[list[Call]]:
    """Collect launches as architecture `arch` would get them; tensors may be on the meta device."""
    global _recorded, _recorded_arch
    _recorded, _recorded_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded = None


@cache
def _capability(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def architecture(x: Tensor) -> int:
    """Compute capability of the device of x, as 90 for 9.0; 0 in the interpreter."""
    if _recorded is not None:
        return _recorded_arch
    return 0 if INTERPRETED else _capability(x.get_device())[0]


def processors(x: Tensor) -> int:
    """Multiprocessors of the device of x; those of an H200 where there is none."""
    return 132 if INTERPRETED or _recorded is not None else _capability(x.get_device())[1]


def sizes(op: str, x: Tensor) -> dict[str, int]:
    """The table's entry for the device of x."""
    arch, table = architecture(x), _TABLE[op]
    return dict(table[max((a for a in table if a <= arch), default=0)])


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on the current stream. A grid with an empty dimension does nothing."""
    if not all(grid):
        return
    options["enable_fp_fusion"] = False
    if _recorded is not None:
        _recorded.append(Call(kernel, arguments, options))
        return
    where = arguments[0].device
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


def warps_for(elements: int, per_thread: int = 16) -> int:
    """Warps, a power of two up to 16, so that a tile leaves each thread about `per_thread` elements."""
    return min(16, triton.next_power_of_2(max(1, elements // (32 * per_thread))))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


if INTERPRETED:
    from quota_kernels import interpreted

    interpreted.install()

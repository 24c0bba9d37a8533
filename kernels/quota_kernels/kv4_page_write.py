"""`kv4_page_write`: packed keys or values of new tokens go to their places in the pages of a pool."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.launch import launch


@triton.jit
def kv4_page_write_kernel(
    pages_q, pages_scale, pages_zero, q, scale, zero, slot, rows, heads, places, row_bytes, BYTES: tl.constexpr
):
    """Program (row, head)."""
    m, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    to = tl.load(slot + m)
    b = tl.arange(0, BYTES)
    stored = to >= 0
    at = (to // places * heads + h) * places + to % places
    source = h * rows + m
    inside = stored & (b < row_bytes)
    tl.store(pages_q + at * row_bytes + b, tl.load(q + source * row_bytes + b, mask=inside, other=0), mask=inside)
    tl.store(pages_scale + at, tl.load(scale + source), mask=stored)
    tl.store(pages_zero + at, tl.load(zero + source), mask=stored)


def kv4_page_write(pages: Any, rows: Any, slot: Tensor) -> None:
    """As `quota.ops.kv4_page_write`; the pages are contiguous."""
    q, scale, zero = (t.contiguous() for t in rows)
    heads, places, row_bytes = pages[0].shape[1:]
    launch(
        kv4_page_write_kernel,
        (q.shape[2], heads),
        *pages,
        q,
        scale,
        zero,
        slot.contiguous(),
        q.shape[2],
        heads,
        places,
        row_bytes,
        triton.next_power_of_2(row_bytes),
        num_warps=1,
    )

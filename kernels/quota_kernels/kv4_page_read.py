"""`kv4_page_read`: the pages of several sequences as one contiguous cache, filled at the right end."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.launch import cdiv, launch

_SLOTS = 32


@triton.jit
def kv4_page_read_kernel(
    pages_q,
    pages_scale,
    pages_zero,
    table,
    length,
    q,
    scale,
    zero,
    heads,
    places,
    row_bytes,
    units,
    capacity,
    SLOTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Program (sequence * heads, SLOTS slots); zeros before a sequence's first slot."""
    pair = tl.program_id(0).to(tl.int64)
    sequence, head = pair // heads, pair % heads
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    b = tl.arange(0, BYTES)
    behind = slot - (capacity - tl.load(length + sequence))
    filled, inside = (behind >= 0) & (slot < capacity), slot < capacity
    unit = tl.load(table + sequence * units + behind // places, mask=filled, other=0).to(tl.int64)
    at = (unit * heads + head) * places + behind % places
    to = pair * capacity + slot
    wide = b[None, :] < row_bytes
    packed = tl.load(pages_q + at[:, None] * row_bytes + b[None, :], mask=filled[:, None] & wide, other=0)
    tl.store(q + to[:, None] * row_bytes + b[None, :], packed, mask=inside[:, None] & wide)
    tl.store(scale + to, tl.load(pages_scale + at, mask=filled, other=0.0), mask=inside)
    tl.store(zero + to, tl.load(pages_zero + at, mask=filled, other=0.0), mask=inside)


def kv4_page_read(pages: Any, table: Tensor, length: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `quota.ops.kv4_page_read`."""
    table = table.contiguous()
    batch, units = table.shape
    heads, places, row_bytes = pages[0].shape[1:]
    q = torch.empty(batch, heads, capacity, row_bytes, dtype=torch.uint8, device=table.device)
    scale, zero = (torch.empty(batch, heads, capacity, dtype=torch.float32, device=table.device) for _ in range(2))
    launch(
        kv4_page_read_kernel,
        (batch * heads, cdiv(capacity, _SLOTS)),
        *pages,
        table,
        length.contiguous(),
        q,
        scale,
        zero,
        heads,
        places,
        row_bytes,
        units,
        capacity,
        _SLOTS,
        triton.next_power_of_2(row_bytes),
        num_warps=4,
    )
    return q, scale, zero

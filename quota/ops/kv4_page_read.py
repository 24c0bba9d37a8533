"""`kv4_page_read`: the pages of several sequences as one contiguous cache, which `kv4_attention` reads."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.weights import Kv


def kv4_page_read_ref(pages: Kv, table: Tensor, length: Tensor, capacity: int) -> Kv:
    """pages as in `kv4_page_write`; table int32 [B, W] (units in order), length int32 [B] -> (q uint8 [B, Hkv,
    capacity, D/2], scale, zero float32 [B, Hkv, capacity]): row b's slots lie at capacity - length[b] .. capacity,
    zeros before them.

    Exactness: a copy.
    """
    q, scale, zero = (pages_in_order(page, table, length, capacity) for page in pages)
    return q, scale, zero


def pages_in_order(page: Tensor, table: Tensor, length: Tensor, capacity: int) -> Tensor:
    """One tensor [U, Hkv, P, ...] of a pool as above: [B, Hkv, capacity, ...]."""
    cache = page.new_zeros(len(table), page.shape[1], capacity, *page.shape[3:])
    for row, (units, slots) in enumerate(zip(table.long(), length.tolist(), strict=True)):
        taken = page[units[: -(-slots // page.shape[2])]].transpose(0, 1).flatten(1, 2)
        cache[row, :, capacity - slots :] = taken[:, :slots]
    return cache


kv4_page_read = Op(kv4_page_read_ref, native, triton)  # the first that supports the device
